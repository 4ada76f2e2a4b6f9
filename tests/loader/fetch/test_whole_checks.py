"""Objects that come whole are compared with the store's checksums and with a manifest; wrong ones change nothing."""

from __future__ import annotations

import base64
import gzip
import hashlib
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_server import Behaviour, bad_server
from rankload.loader import CorruptError, FormatError, State, load
from rankload.loader.receipt import FileRecord, Receipt
from rankload.loader.stores import digests as digest_module
from rankload.loader.stores.digests import new_digest
from rankload.loader.stores.local import LocalStore
from rankload.loader.stores.locate import locate
from rankload.loader.stores.manifest import find_manifests, key_of, known_sums

NAME = "/folder/model file.pt.gz"
URL = NAME.replace(" ", "%20")


def value_of(algorithm: str, data: bytes) -> str:
    digest = new_digest(algorithm)
    if digest is None:
        pytest.skip(f"nothing computes {algorithm}")
    digest.update(memoryview(data))
    return base64.b64encode(digest.digest()).decode()


@pytest.fixture
def module() -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(8, 8)


@pytest.fixture
def data(tmp_path: Path, module: torch.nn.Linear) -> bytes:
    """Compressed, and so whole wherever it is fetched from."""
    torch.save({"model": module.state_dict()}, tmp_path / "saved.pt")
    return gzip.compress((tmp_path / "saved.pt").read_bytes())


Restore = Callable[..., Receipt]


@pytest.fixture
def restore(tmp_path: Path, module: torch.nn.Linear) -> Restore:
    def run(path: str | Path, *, spoiled: str | None = None, **options: Any) -> Receipt:
        """The load's receipt; where `spoiled`, what the error must say, and nothing may have changed."""
        target = torch.nn.Linear(8, 8)
        before = target.weight.detach().clone()
        arguments = {"load_weights_only": True, "progress_bar": False}
        options = {"cache_dir": str(tmp_path / "cache"), **options}
        if spoiled is not None:
            with pytest.raises(CorruptError, match=spoiled):
                load(str(path), State(target), options=options, **arguments)  # type: ignore[arg-type]
            assert torch.equal(target.weight, before)
            return Receipt("", "", "", None, 1, 1, True, "")
        receipt = load(str(path), State(target), options=options, **arguments).receipt  # type: ignore[arg-type]
        assert torch.equal(target.weight, module.weight)
        return receipt

    return run


HEADERS = {
    "crc32": "x-amz-checksum-crc32",
    "crc32c": "x-amz-checksum-crc32c",
    "crc64nvme": "x-amz-checksum-crc64nvme",
    "md5": "Content-MD5",
    "sha256": "x-amz-checksum-sha256",
}


@pytest.mark.parametrize("algorithm", HEADERS)
@pytest.mark.parametrize("verify", ["before", "during", "off"])
def test_the_servers_checksum(data: bytes, restore: Restore, algorithm: str, verify: str) -> None:
    right, wrong = value_of(algorithm, data), value_of(algorithm, data + b"x")
    served = Behaviour(data, headers={HEADERS[algorithm]: right})
    with bad_server({URL: served}) as server:
        url = server.url(URL)
        (file,) = restore(url, verify=verify).files
        told = f"{algorithm} of the store"
        assert file.verified_by == (("zip CRC-32", told) if verify != "off" else ())
        served.headers = {HEADERS[algorithm]: wrong}
        if verify == "off":
            restore(url, verify=verify)
            return
        expected, got = base64.b64decode(wrong).hex(), base64.b64decode(right).hex()
        restore(url, verify=verify, spoiled=f"model%20file.pt.gz: .*{told}: expected {expected}, got {got}")


def test_a_large_object_that_comes_by_ranges(
    data: bytes, restore: Restore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankload.loader.fetch import remote_files

    monkeypatch.setattr(remote_files, "PARALLEL_FROM_BYTES", 1)
    served = Behaviour(data, headers={"Content-MD5": value_of("md5", data)})
    with bad_server({URL: served}) as server:
        assert restore(server.url(URL)).files[0].verified_by[-1] == "md5 of the store"
        assert all(one.range for one in server.asked)
        served.body = bytes([*data[:-1], data[-1] ^ 1])
        restore(server.url(URL), spoiled="md5 of the store")


@pytest.mark.parametrize("from_bytes", [1, 1 << 30])
def test_a_server_that_answers_no_head(
    data: bytes, restore: Restore, from_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As URLs that are signed for GET alone."""
    from rankload.loader.fetch import remote_files

    monkeypatch.setattr(remote_files, "PARALLEL_FROM_BYTES", from_bytes)
    headers = {"x-goog-hash": f"md5={value_of('md5', data)}"}
    with bad_server({URL: Behaviour(data, headers=headers, head_status=403)}) as server:
        assert restore(server.url(URL)).files[0].verified_by[-1] == "md5 of the store"
        server.objects[URL].headers = {"x-goog-hash": f"md5={value_of('md5', data + b'x')}"}
        restore(server.url(URL), spoiled="md5 of the store")


def test_a_checksum_that_no_package_computes(
    data: bytes, restore: Restore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_module, "_PACKAGES", {"crc64nvme": (("awscrt", "no_such_module", None),)})
    headers = {"x-amz-checksum-crc64nvme": base64.b64encode(bytes(8)).decode()}
    with bad_server({URL: Behaviour(data, headers=headers)}) as server:
        (file,) = restore(server.url(URL)).files
    assert file.not_compared == ("crc64nvme of the store (needs awscrt)",)
    assert file.verified_by == ("zip CRC-32",)


@pytest.mark.parametrize("name", ["MANIFEST", "SHA256SUMS", "model file.pt.gz.sha256"])
def test_a_manifest_beside_a_remote_file(data: bytes, restore: Restore, name: str) -> None:
    line = f"{hashlib.sha256(data).hexdigest()} *./model file.pt.gz\n".encode()
    at = f"/folder/{name}".replace(" ", "%20")
    served = Behaviour(data, headers={"Content-MD5": value_of("md5", data)})
    with bad_server({URL: served, at: Behaviour(line)}) as server:
        (file,) = restore(server.url(URL)).files
        assert file.verified_by == ("zip CRC-32", "md5 of the store", f"sha256 of {name}")
        server.objects[at].body = line.replace(line[:4], b"0000")
        restore(server.url(URL), spoiled=f"sha256 of {name}: expected 0000")
        asked = len(server.asked)
        restore(server.url(URL), verify="off")
        assert [one.path for one in server.asked[asked:]] == [URL]
        server.objects[at].body = b"no checksums"
        if name == "MANIFEST":
            (note,) = restore(server.url(URL)).notes
            assert "MANIFEST is not in sha256sum's format" in note
        else:
            with pytest.raises(FormatError, match="as sha256sum writes them"):
                restore(server.url(URL))


def test_a_manifest_beside_a_file_that_is_used_in_place(
    tmp_path: Path, restore: Restore, data: bytes
) -> None:
    path = tmp_path / "saved.pt"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "SHA256SUMS").write_text(f"{digest}  saved.pt\n{'0' * 64}  other.pt\n")
    (file,) = restore(path).files
    assert file.verified_by == ("zip CRC-32",)
    assert "verify='before' only" in file.not_compared[0]
    (file,) = restore(path, verify="before").files
    assert (file.verified_by, file.not_compared) == (("zip CRC-32", "sha256 of SHA256SUMS"), ())
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  saved.pt\n")
    restore(path, verify="before", spoiled="saved.pt: .*sha256 of SHA256SUMS: expected 0000")
    restore(path)


def test_a_local_archive_is_read_whole_and_compared(tmp_path: Path, restore: Restore, data: bytes) -> None:
    path = tmp_path / "saved.pt.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(tmp_path / "saved.pt", "saved.pt")
    (tmp_path / "saved.pt.tar.sha256").write_text(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  saved.pt.tar\n"
    )
    assert restore(path).files[0].verified_by == ("zip CRC-32", "sha256 of saved.pt.tar.sha256")
    (tmp_path / "saved.pt.tar.sha256").write_text(f"{'0' * 64}  saved.pt.tar\n")
    restore(path, spoiled="sha256 of saved.pt.tar.sha256")


def test_torchs_older_format_is_verified_by_what_the_store_tells(
    tmp_path: Path, module: torch.nn.Linear, restore: Restore
) -> None:
    torch.save({"model": module.state_dict()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "old.pt").read_bytes()
    with bad_server({"/old.pt": Behaviour(data, headers={"Content-MD5": value_of("md5", data)})}) as server:
        receipt = restore(server.url("/old.pt"))
        assert (receipt.files[0].verified, receipt.unverified) == (True, ())
        server.objects["/old.pt"].headers = {}
        receipt = restore(server.url("/old.pt"))
        assert (receipt.files[0].verified_by, len(receipt.unverified)) == ((), 1)


def test_a_file_that_comes_in_parts(tmp_path: Path) -> None:
    def make() -> torch.nn.Module:
        return torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(3)))

    module = make()
    torch.save({"model": module.state_dict()}, tmp_path / "saved.pt")
    data = (tmp_path / "saved.pt").read_bytes()
    manifest = Behaviour(f"{hashlib.sha256(data).hexdigest()}  saved.pt\n".encode())

    def run(url: str, verify: str) -> FileRecord:
        target = make()
        options = {"cache_dir": str(tmp_path / "cache"), "verify": verify}
        result = load(url, State(target), load_weights_only=True, progress_bar=False, options=options)
        assert all(map(torch.equal, target.parameters(), module.parameters()))
        return result.receipt.files[0]

    with bad_server({"/saved.pt": Behaviour(data), "/SHA256SUMS": manifest}) as server:
        url = server.url("/saved.pt")
        file = run(url, "during")
        assert file.verified_by == ("zip CRC-32",)
        assert file.not_compared == ("sha256 of SHA256SUMS (only parts of the file came)",)
        file = run(url, "before")
        assert file.verified_by == ("zip CRC-32", "sha256 of SHA256SUMS")
        assert file.not_compared == ()
        assert len(data) <= file.fetched_bytes <= len(data) + 10_000
        manifest.body = f"{'0' * 64}  saved.pt\n".encode()
        with pytest.raises(CorruptError, match="sha256 of SHA256SUMS"):
            run(url, "before")


def test_manifests_of_a_deepspeed_folder(tmp_path: Path) -> None:
    tag = tmp_path / "global_step3"
    tag.mkdir()
    model = tag / "mp_rank_00_model_states.pt"
    model.write_bytes(b"model")
    (tmp_path / "latest").write_text("global_step3")
    sums = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("inner", "outer")}
    (tmp_path / "SHA256SUMS").write_text(
        f"{sums['outer']}  global_step3/{model.name}\n{sums['outer']}  global_step3/other.pt\n"
    )
    (tag / "MANIFEST").write_text(f"{sums['inner']}  {model.name}\n")
    store = LocalStore()
    found = known_sums(find_manifests(store, locate(store, str(tmp_path))))
    told = {name: found[key_of(store, str(tag / name))] for name in (model.name, "other.pt")}
    assert {name: (one.sha256.hex(), one.told_by) for name, one in told.items()} == {
        model.name: (sums["inner"], "MANIFEST"),
        "other.pt": (sums["outer"], "SHA256SUMS"),
    }
    # Named itself, its folder is the checkpoint.
    found = known_sums(find_manifests(store, locate(store, str(tag))))
    assert set(found) == {key_of(store, str(model))}
