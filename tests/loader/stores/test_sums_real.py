"""Checksums that real stores keep: SeaweedFS (S3), Azurite (Azure Blob), fake-gcs-server; nginx and hadro keep none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rankload.loader import CorruptError
from rankload.loader.fetch.whole_checks import Compared, WholeChecks
from rankload.loader.stores.digests import new_digest, packages_of
from rankload.loader.stores.open import open_store

DATA = bytes(range(256)) * 40_000
PART_BYTES = 5 << 20
ALGORITHMS = ("CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256")


def fetched_and_compared(
    url: str, options: Mapping[str, Any], folder: Path, *, spoil: bool = False
) -> Compared:
    store, name = open_store(url, None, options)
    info = store.stat(name)
    assert info is not None
    path = folder / "object"
    store.download(name, str(path), lambda n_bytes: None, info)
    if spoil:
        with path.open("r+b") as file:
            file.seek(-7, 2)
            file.write(b"\xff")
    return WholeChecks("during").compare(store, info, str(path), lambda n_bytes: None)


def put_s3(server: Any, key: str, algorithm: str, kind: str | None = None) -> str:
    """`DATA` as one object, in parts where there is a `kind` of checksum to make of theirs; the URL."""
    import fsspec

    if algorithm.startswith("CRC"):
        # botocore makes these with it; reading them needs it no more than any other.
        pytest.importorskip("awscrt")
    files = fsspec.filesystem("s3", skip_instance_cache=True, **server.options)
    place = {"Bucket": "checkpoints", "Key": key}
    if kind is None:
        files.call_s3("put_object", **place, Body=DATA, ChecksumAlgorithm=algorithm)
        return f"s3://checkpoints/{key}"
    begun = files.call_s3("create_multipart_upload", **place, ChecksumAlgorithm=algorithm, ChecksumType=kind)
    place["UploadId"] = begun["UploadId"]
    parts = []
    for number, start in enumerate(range(0, len(DATA), PART_BYTES), 1):
        body = DATA[start : start + PART_BYTES]
        put = files.call_s3("upload_part", **place, PartNumber=number, Body=body, ChecksumAlgorithm=algorithm)
        name = f"Checksum{algorithm}"
        parts.append({"PartNumber": number, "ETag": put["ETag"], name: put.get(name)})
    files.call_s3("complete_multipart_upload", **place, MultipartUpload={"Parts": parts})
    return f"s3://checkpoints/{key}"


def needs(algorithm: str) -> None:
    if new_digest(algorithm) is None:
        pytest.skip(f"needs {' or '.join(packages_of(algorithm))}")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_s3(seaweedfs_server: Any, tmp_path: Path, algorithm: str) -> None:
    needs(algorithm.lower())
    url = put_s3(seaweedfs_server, f"whole-{algorithm}", algorithm)
    compared = fetched_and_compared(url, seaweedfs_server.options, tmp_path)
    assert compared == Compared((f"{algorithm.lower()} of the store",))
    with pytest.raises(CorruptError, match=rf"whole-{algorithm}: .*{algorithm.lower()} of the store"):
        fetched_and_compared(url, seaweedfs_server.options, tmp_path, spoil=True)


@pytest.mark.parametrize(
    ("algorithm", "kind", "label"),
    [
        ("CRC32C", "COMPOSITE", "crc32c of 2 parts of the store"),
        ("SHA256", "COMPOSITE", "sha256 of 2 parts of the store"),
        ("CRC32C", "FULL_OBJECT", "crc32c of the store"),
    ],
)
def test_s3_in_parts(seaweedfs_server: Any, tmp_path: Path, algorithm: str, kind: str, label: str) -> None:
    needs(algorithm.lower())
    url = put_s3(seaweedfs_server, f"parts-{algorithm}-{kind}", algorithm, kind)
    assert fetched_and_compared(url, seaweedfs_server.options, tmp_path) == Compared((label,))
    with pytest.raises(CorruptError, match=label):
        fetched_and_compared(url, seaweedfs_server.options, tmp_path, spoil=True)


def test_s3_of_parts_whose_ends_are_not_told(
    seaweedfs_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankload.loader.stores import sums as s3_sums

    monkeypatch.setattr(s3_sums, "_part_sizes", lambda files, place: ())
    url = put_s3(seaweedfs_server, "parts-unknown", "CRC32C", "COMPOSITE")
    compared = fetched_and_compared(url, seaweedfs_server.options, tmp_path, spoil=True)
    label = "crc32c of 2 parts of the store (the store does not tell where its parts end)"
    assert compared == Compared((), (label,))


def test_azure(azurite_server: Any, tmp_path: Path) -> None:
    import fsspec

    files = fsspec.filesystem("az", skip_instance_cache=True, **azurite_server.options)
    files.pipe_file("checkpoints/summed", DATA)
    url, options = "az://checkpoints/summed", azurite_server.options
    assert fetched_and_compared(url, options, tmp_path) == Compared(("md5 of the store",))
    with pytest.raises(CorruptError, match=r"summed: .*md5 of the store"):
        fetched_and_compared(url, options, tmp_path, spoil=True)


def test_gcs(gcs_server: Any, tmp_path: Path) -> None:
    url = "gs://checkpoints/larger.pt"
    algorithm = "crc32c" if new_digest("crc32c") is not None else "md5"
    assert fetched_and_compared(url, gcs_server.options, tmp_path) == Compared((f"{algorithm} of the store",))
    with pytest.raises(CorruptError, match=rf"larger.pt: .*{algorithm} of the store"):
        fetched_and_compared(url, gcs_server.options, tmp_path, spoil=True)


def test_servers_that_keep_none(nginx_server: Any, hadro_server: Any, tmp_path: Path) -> None:
    assert fetched_and_compared(f"{nginx_server.url}/checkpoints/larger.pt", {}, tmp_path) == Compared()
    assert fetched_and_compared("s3://checkpoints/larger.pt", hadro_server.options, tmp_path) == Compared()
