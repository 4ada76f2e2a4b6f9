"""What stores and manifests tell of whole objects, and how it is read."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import zlib
from email.message import Message
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rankload.loader import FormatError
from rankload.loader.stores.digests import ALGORITHMS, digest_bytes, new_digest, packages_of
from rankload.loader.stores.manifest import is_manifest, manifest_beside, manifest_of, parse_manifest
from rankload.loader.stores.sums import StoredSum, fastest_first, in_headers, in_info, in_linked, in_s3

DATA = b"123456789"
MD5 = hashlib.md5(DATA).digest()
SHA256 = hashlib.sha256(DATA).digest()
CRC32C = (0xE3069283).to_bytes(4, "big")
CRC64NVME = (0xAE8B14860A799888).to_bytes(8, "big")


def b64(value: bytes) -> str:
    return base64.b64encode(value).decode()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=20)
@given(parts=st.lists(st.binary(max_size=300), max_size=5))
def test_a_checksum_of_pieces_is_that_of_the_whole(algorithm: str, parts: list[bytes]) -> None:
    pieces, whole = new_digest(algorithm), new_digest(algorithm)
    if pieces is None or whole is None:
        pytest.skip(f"needs {' or '.join(packages_of(algorithm))}")
    for part in parts:
        pieces.update(memoryview(bytearray(part)))
    whole.update(memoryview(b"".join(parts)))
    assert pieces.digest() == whole.digest()
    assert len(whole.digest()) == digest_bytes(algorithm)


@pytest.mark.parametrize(
    ("algorithm", "value"),
    [
        ("crc32", zlib.crc32(DATA).to_bytes(4, "big")),
        ("crc32c", CRC32C),
        ("crc64nvme", CRC64NVME),
        ("sha256", SHA256),
        ("md5", MD5),
    ],
)
def test_checksums_have_the_values_that_are_published(algorithm: str, value: bytes) -> None:
    digest = new_digest(algorithm)
    if digest is None:
        pytest.skip(f"needs {' or '.join(packages_of(algorithm))}")
    digest.update(memoryview(DATA))
    assert digest.digest() == value


@pytest.mark.parametrize(
    ("headers", "of_a_part", "of_the_whole"),
    [
        ({"Content-MD5": b64(MD5)}, [], [("md5", MD5)]),
        (
            {"Repr-Digest": f"sha-256=:{b64(SHA256)}:, unknown=:AA==:"},
            [("sha256", SHA256)],
            [("sha256", SHA256)],
        ),
        ({"Digest": f"SHA-256={b64(SHA256)},MD5={b64(MD5)}"}, *2 * ([("sha256", SHA256), ("md5", MD5)],)),
        ({"x-goog-hash": f"crc32c={b64(CRC32C)},md5={b64(MD5)}"}, *2 * ([("crc32c", CRC32C), ("md5", MD5)],)),
        ({"x-goog-hash": f"crc32c={b64(CRC32C)}", "x-goog-stored-content-encoding": "gzip"}, [], []),
        ({"x-ms-blob-content-md5": b64(MD5), "x-ms-blob-type": "BlockBlob"}, *2 * ([("md5", MD5)],)),
        ({"x-ms-blob-content-md5": b64(MD5), "x-ms-blob-type": "AppendBlob"}, [], []),
        ({"x-amz-checksum-crc64nvme": b64(CRC64NVME)}, [], [("crc64nvme", CRC64NVME)]),
        ({"Content-MD5": b64(MD5), "Content-Encoding": "gzip"}, [], []),
        ({"Content-MD5": b64(MD5[:-1])}, [], []),
        ({"Content-MD5": "no base64"}, [], []),
        ({"ETag": f'"{MD5.hex()}"'}, [], []),
    ],
)
def test_headers(
    headers: dict[str, str], of_a_part: list[tuple[str, bytes]], of_the_whole: list[tuple[str, bytes]]
) -> None:
    assert [(one.algorithm, one.value) for one in in_headers(headers, whole=False)] == of_a_part
    assert [(one.algorithm, one.value) for one in in_headers(headers)] == of_the_whole


def test_fields_that_come_twice() -> None:
    headers = Message()
    headers["X-Goog-Hash"] = f"crc32c={b64(CRC32C)}"
    headers["X-Goog-Hash"] = f"md5={b64(MD5)}"
    assert [one.algorithm for one in in_headers(headers)] == ["crc32c", "md5"]


def test_s3_of_parts() -> None:
    told = {"ChecksumCRC32C": f"{b64(CRC32C)}-3", "ChecksumType": "COMPOSITE"}
    assert in_s3(told) == (StoredSum("crc32c", CRC32C, n_parts=3),)
    # Without the number of parts it can't be told what it is of.
    assert in_s3({"ChecksumCRC32C": b64(CRC32C), "ChecksumType": "COMPOSITE"}) == ()
    # Python takes no number of so many digits.
    assert in_s3({"ChecksumCRC32C": f"{b64(CRC32C)}-{'9' * 4500}", "ChecksumType": "COMPOSITE"}) == ()
    whole = in_s3({"ChecksumCRC32C": b64(CRC32C), "ChecksumType": "FULL_OBJECT"})
    assert whole == (StoredSum("crc32c", CRC32C),)
    assert fastest_first([*in_s3(told), StoredSum("md5", MD5)])[0].algorithm == "md5"


def test_what_file_systems_say() -> None:
    gcs = {"crc32c": b64(CRC32C), "md5Hash": b64(MD5)}
    assert [one.algorithm for one in in_info(["gs", "gcs"], gcs)] == ["crc32c", "md5"]
    assert in_info(["gs"], {**gcs, "contentEncoding": "gzip"}) == ()
    assert in_info(["abfs", "az"], {"content_settings": {"content_md5": bytearray(MD5)}})[0].value == MD5
    assert in_info(["hf"], {"lfs": {"sha256": SHA256.hex()}})[0].value == SHA256
    assert in_info(["hf"], {"lfs": None}) == in_info(["memory"], gcs) == ()
    assert in_linked({"X-Linked-ETag": f'"{SHA256.hex()}"'})[0].value == SHA256
    assert in_linked({"X-Linked-ETag": '"abc"'}) == ()


@pytest.mark.parametrize("options", [[], ["--binary"], ["--tag"]])
def test_what_sha256sum_writes(tmp_path: Path, options: list[str]) -> None:
    names = ["plain", "with blanks", "folder/deep", "line\nbreak", "back\\slash", "*star"]
    (tmp_path / "folder").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    told = subprocess.run(
        ["sha256sum", *options, *(f"./{name}" for name in names)],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    assert is_manifest(told.stdout)
    sums = parse_manifest(b"# made today\r\n\n" + told.stdout, "SHA256SUMS").sums
    assert sums == {name: hashlib.sha256(name.encode()).digest() for name in names}


def test_manifests_that_are_none() -> None:
    line = f"{SHA256.hex()}  a\n"
    assert not [text for text in (b'{"files": []}', b"\xff\xfe", b"") if is_manifest(text)]
    for text in (line + "b: 12", line + f"{MD5.hex()}  b", line + f"{SHA256.hex()} b"):
        with pytest.raises(FormatError, match="as sha256sum writes them"):
            parse_manifest(text.encode(), "SHA256SUMS")
    with pytest.raises(FormatError, match="two different checksums of 'a'"):
        parse_manifest(f"{line}{'0' * 64}  ./a\n".encode(), "SHA256SUMS")
    with pytest.raises(FormatError, match="SHA256SUMS"):
        parse_manifest(line.encode() + b"\xff", "SHA256SUMS")
    assert parse_manifest(f"{line}{'0' * 64}  ../b\n{'1' * 64}  /c\n".encode(), "m").sums == {"a": SHA256}


@given(
    st.dictionaries(st.text("a\\\n\r é*", min_size=1).filter(str.strip), st.binary(min_size=32, max_size=32))
)
def test_a_manifest_that_is_written_is_read_again(sums: dict[str, bytes]) -> None:
    data = manifest_of({name: value.hex() for name, value in sums.items()})
    assert parse_manifest(data, "m").sums == sums


def test_a_name_that_is_no_text_is_left_out_of_the_manifest_beside_it() -> None:
    assert manifest_beside("a", SHA256.hex()) == f"{SHA256.hex()}  a\n".encode()
    assert manifest_beside("a\udcff", SHA256.hex()) == f"{SHA256.hex()}\n".encode()
