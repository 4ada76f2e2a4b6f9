"""What comes damaged, or is damaged in the cache, is fetched once more within the load, and the receipt says so."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import struct
import tarfile
import zipfile
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_server import BadServer, Behaviour, bad_server
from dcp_folders import module_of, save
from rankload.loader import CorruptError, LoadResult, PartialRestoreError, State, load, read
from rankload.loader.exporting.export import export_checkpoint
from rankload.loader.wholeness.check import check_whole
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint._extension import ZStandard

WIDE = 768
"""2.25 MiB of fp32 a weight: fetched directly where the mode lets it."""


def a_state(seed: int) -> State:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(WIDE, WIDE), torch.nn.Linear(WIDE, WIDE, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7)
    return State(model, [optimizer], [scheduler])


def values(state: State) -> dict[str, torch.Tensor]:
    """Every tensor that a load restores."""
    model, optimizer = state.model, state.optimizers[0]
    found = dict(model.state_dict())
    for position, entries in optimizer.state_dict()["state"].items():
        found |= {f"{position}/{key}": value for key, value in entries.items()}
    return {name: value.clone() for name, value in found.items()}


def saved(state: State) -> bytes:
    file = io.BytesIO()
    torch.save(
        {
            "state": {
                "model": state.model.state_dict(),
                "optimizers": {"AdamW": state.optimizers[0].state_dict()},
                "schedulers": {"StepLR": state.schedulers[0].state_dict()},
            },
            "rng": None,
        },
        file,
    )
    return file.getvalue()


def same(state: State, wanted: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, wanted[name]) for name, value in values(state).items())


@pytest.fixture(scope="module")
def source() -> tuple[bytes, dict[str, torch.Tensor]]:
    state = a_state(1)
    return saved(state), values(state)


def records(data: bytes) -> dict[str, tuple[int, int, int]]:
    """The zip's records by their last names: where the header is, the data and its end."""
    found = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            name, extra = struct.unpack_from("<2H", data, info.header_offset + 26)
            start = info.header_offset + 30 + name + extra
            found[info.filename.partition("/")[2]] = (info.header_offset, start, start + info.file_size)
    return found


def in_weight(data: bytes) -> int:
    """A byte of a large storage of the model."""
    return records(data)["data/0"][1] + 70_001


def in_moment(data: bytes) -> int:
    """A byte of the last large storage, of the optimizer's state."""
    last = max(
        (place for place in records(data).values() if place[2] - place[1] > 1 << 20), key=lambda one: one[1]
    )
    return last[1] + 1_000_003


def in_bias(data: bytes) -> int:
    """A byte of a storage that comes right after the index."""
    small = next(
        place
        for name, place in records(data).items()
        if name.startswith("data/") and place[2] - place[1] == 4 * WIDE
    )
    return small[1] + 9


def in_step(data: bytes) -> int:
    """A byte of a storage of 4 bytes between two large ones."""
    return max(start for _, start, stop in records(data).values() if stop - start == 4) + 1


def in_header(data: bytes) -> int:
    """The first byte of a large storage's header."""
    return records(data)["data/0"][0]


def in_pickle(data: bytes) -> int:
    return records(data)["data.pkl"][1] + 40


def in_directory(data: bytes) -> int:
    """A byte of the zip's directory: its first record's method."""
    return data.rindex(b"PK\1\2", 0, data.rindex(b"PK\5\6")) + 10


PLACES: list[Callable[[bytes], int]] = [
    in_weight,
    in_moment,
    in_bias,
    in_step,
    in_header,
    in_pickle,
    in_directory,
]
WAYS = [("auto", "during"), ("direct", "during"), ("node", "during"), ("node", "before")]


def restore(server: BadServer, path: str, cache: Path, **options: Any) -> tuple[State, LoadResult]:
    state = a_state(2)
    result = load(server.url(path), state, options={"cache_dir": str(cache), **options}, progress_bar=False)
    return state, result


@pytest.mark.parametrize(("mode", "verify"), WAYS)
def test_a_byte_that_flips_once_is_fetched_again(
    mode: str, verify: str, source: tuple[bytes, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    data, wanted = source
    served = {f"/{place.__name__}": Behaviour(data, flips={place(data): 1}) for place in PLACES}
    with bad_server({"/clean": Behaviour(data), **served}) as server:
        _, clean = restore(server, "/clean", tmp_path, mode=mode, verify=verify)
        assert not clean.receipt.fetched_again
        for path, behaviour in served.items():
            state, result = restore(server, path, tmp_path, mode=mode, verify=verify)
            receipt = result.receipt
            assert not any(behaviour.flips.values()), f"{path}: the fault never fired"
            assert same(state, wanted), path
            (again,) = receipt.fetched_again
            assert again.name == server.url(path)
            assert again.why
            # One storage, or an index, and not the file; a source that is opened for it asks for one byte.
            assert 0 < again.nbytes < 3 << 20, (path, again)
            more = server.sent[path] - server.sent["/clean"]
            assert again.nbytes <= more <= again.nbytes + 1, (path, again, more)
            assert receipt.fetched_bytes - clean.receipt.fetched_bytes == again.nbytes, (path, again)
            assert f"fetched again: {again.name} ({again.nbytes:,} bytes: {again.why})" in str(receipt)


def test_verify_reads_again_what_differs(
    source: tuple[bytes, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """By a storage, and by a manifest's checksum of the whole file; what differs twice is damaged."""
    data = source[0]
    sums = f"{hashlib.sha256(data).hexdigest()}  "
    served = {f"/{name}": Behaviour(data, flips={in_moment(data): times}) for name, times in
              (("a.pt", 1), ("b.pt", 1), ("c.pt", 2))}  # fmt: skip
    with bad_server({**served, "/b.pt.sha256": Behaviour(sums.encode())}) as server:
        states = {}
        for path in served:
            (states[path],) = check_whole(server.url(path)).files
            assert not any(served[path].flips.values()), "the fault never fired"
    assert [one.state for one in states.values()] == ["whole", "whole", "damaged"]
    assert "not when it was fetched again" in states["/a.pt"].reason
    assert "not when it was fetched again" in states["/b.pt"].reason


def test_what_is_damaged_twice_is_an_error_that_names_both_sums_and_the_next_load_fetches_it_anew(
    source: tuple[bytes, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Also with a cache that keeps what was fetched: it does not poison the later loads."""
    data, wanted = source
    kept = {"cache_size": "1GB", "mode": "node"}
    with bad_server({"/a": Behaviour(data, flips={in_weight(data): 2})}) as server:
        with pytest.raises(
            CorruptError, match=r"has CRC-32 .* directory says .* It was fetched twice"
        ) as raised:
            restore(server, "/a", tmp_path, verify="before", **kept)
        assert "fetch" not in raised.value.message.partition("It was")[0]
        state, result = restore(server, "/a", tmp_path, **kept)
        assert same(state, wanted)
        assert len(result.receipt.fetched_again) == 1
        sent = server.sent["/a"]
        state, result = restore(server, "/a", tmp_path, **kept)
        assert same(state, wanted)
        assert not result.receipt.fetched_again
        assert server.sent["/a"] - sent <= 3
        server.objects["/b"] = Behaviour(data, flips={in_weight(data): 2})
        with pytest.raises(PartialRestoreError, match=r"has CRC-32 .* It was fetched twice"):
            restore(server, "/b", tmp_path)


def test_what_was_damaged_in_the_cache_is_fetched_again(
    source: tuple[bytes, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """In the file of parts, and of an object that came whole, because its server does no ranges."""
    data, wanted = source
    kept = {"cache_size": "1GB", "mode": "node"}
    served = {
        "/parts": Behaviour(data),
        "/whole": Behaviour(data, has_ranges=False, headers={"ETag": '"v1"'}),
    }
    with bad_server(served) as server:
        for path in served:
            cache = tmp_path / path[1:]
            restore(server, path, cache, **kept)
            (file,) = (one for one in cache.rglob(path[1:]) if one.is_file())
            damaged = bytearray(file.read_bytes())
            damaged[in_weight(data)] ^= 1
            file.write_bytes(damaged)
            sent = server.sent[path]
            state, result = restore(server, path, cache, **kept)
            assert same(state, wanted), path
            (again,) = result.receipt.fetched_again
            assert "cache" in again.why
            # A server without ranges sends more than what is read, when it is asked for one byte.
            more = server.sent[path] - sent
            assert again.nbytes <= more, path
            assert path == "/whole" or more <= again.nbytes + 2, path
            _, result = restore(server, path, cache, **kept)
            assert not result.receipt.fetched_again, path


@pytest.mark.parametrize("has_ranges", [False, True])
def test_what_comes_whole_is_fetched_again(
    has_ranges: bool, source: tuple[bytes, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """By a storage's CRC-32, a broken index, the store's checksum, and a compressed file's own."""
    data, wanted = source
    packed = gzip.compress(data, 1)
    digest = {"Digest": "SHA-256=" + b64encode(hashlib.sha256(data).digest()).decode()}
    served = {
        "/weight": Behaviour(data, has_ranges=has_ranges, flips={in_weight(data): 1}),
        "/pickle": Behaviour(data, has_ranges=has_ranges, flips={in_pickle(data): 1}),
        "/told": Behaviour(data, has_ranges=has_ranges, headers=digest, flips={in_weight(data): 1}),
        "/a.gz": Behaviour(packed, has_ranges=has_ranges, flips={len(packed) // 2: 1}),
    }
    with bad_server(served) as server:
        for path, behaviour in served.items():
            state, result = restore(server, path, tmp_path)
            assert not any(behaviour.flips.values()), f"{path}: the fault never fired"
            assert same(state, wanted), path
            (again,) = result.receipt.fetched_again
            whole = not has_ranges or path == "/a.gz"
            assert (again.nbytes == len(behaviour.body)) == whole, (path, again)
            assert result.receipt.fetched_bytes <= server.sent[path], path


def test_members_of_a_tar_are_fetched_again(
    source: tuple[bytes, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    data, wanted = source
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("state.pt")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    tar = file.getvalue()
    base = tar.index(data[:200])
    places = {"/tar header": 150, "/weight": base + in_weight(data), "/pickle": base + in_pickle(data)}
    served = {
        f"{path}{ranges}.tar": Behaviour(tar, has_ranges=ranges, flips={at: 1})
        for path, at in places.items()
        for ranges in (False, True)
    }
    served = {path.replace(" ", "-"): behaviour for path, behaviour in served.items()}
    with bad_server(served) as server:
        for path, behaviour in served.items():
            state, result = restore(server, path, tmp_path)
            assert not any(behaviour.flips.values()), f"{path}: the fault never fired"
            assert same(state, wanted), path
            (again,) = result.receipt.fetched_again
            assert (again.nbytes >= len(tar)) != behaviour.has_ranges, (path, again)


@pytest.mark.parametrize("verify", ["during", "before"])
def test_a_safetensors_file_is_fetched_again_by_its_manifest(verify: str, tmp_path: Path) -> None:
    """Large, in parts, of which all are read, and small, whole; it has no other checksums."""
    state = a_state(1)
    wanted = {name: value.clone() for name, value in state.model.state_dict().items()}
    files = {"large": save_tensors(wanted), "small": save_tensors({"w": torch.arange(999.0)})}
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
    served = {f"/m/{name}": Behaviour(data, flips={len(data) - 99: 1}) for name, data in files.items()}
    with bad_server({**served, "/m/SHA256SUMS": Behaviour(sums.encode())}) as server:
        options = {"cache_dir": str(tmp_path), "mode": "node", "verify": verify}
        for name, data in files.items():
            model = a_state(2).model if name == "large" else Single()
            receipt = load(
                server.url(f"/m/{name}"), State(model), options=options, progress_bar=False
            ).receipt
            assert not any(served[f"/m/{name}"].flips.values()), "the fault never fired"
            (again,) = receipt.fetched_again
            assert "sha256 of SHA256SUMS: expected" in again.why
            assert again.nbytes == len(data)
            assert receipt.files[0].verified_by == ("sha256 of SHA256SUMS",)
            right = wanted if name == "large" else {"w": torch.arange(999.0)}
            assert all(torch.equal(value, right[key]) for key, value in model.state_dict().items()), name


class Single(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(999))


def save_tensors(tensors: dict[str, torch.Tensor]) -> bytes:
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.detach().numpy().tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def test_the_files_of_a_dcp_folder_are_fetched_again(tmp_path: Path) -> None:
    """An item's index, an item's tensor, and the metadata that names all items."""
    torch.manual_seed(3)
    model = {"big": torch.rand(900, 900), "small": torch.rand(7)}
    folder = save(tmp_path / "saved", {"model": model})
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    data = files["__0_0.distcp"]
    at = data.index(model["big"].numpy().tobytes()[:64])
    places = {
        "tensor": {"__0_0.distcp": at + 300_001},
        # The name of the first item's pickle, in its zip's directory.
        "index": {"__0_0.distcp": data.index(b"data.pkl", data.index(b"PK\1\2"))},
        "metadata": {".metadata": 0},
    }
    for name, flips in places.items():
        served = {
            f"/{file}": Behaviour(body, flips={flips[file]: 1} if file in flips else {})
            for file, body in files.items()
        }
        with bad_server(served) as server:
            state = State(module_of(model))
            receipt = load(
                server.url(""), state, options={"cache_dir": str(tmp_path / name)}, progress_bar=False
            ).receipt
            assert not any(flip for one in served.values() for flip in one.flips.values()), name
        assert all(torch.equal(value, model[key]) for key, value in state.model.state_dict().items()), name
        assert [one.name.rpartition("/")[2] for one in receipt.fetched_again] == list(flips), name


@pytest.mark.skipif(not ZStandard.is_available(), reason="zstandard is not installed")
def test_compressed_items_of_a_dcp_folder_are_fetched_again(tmp_path: Path) -> None:
    """zstd notices no flip in what it could not compress; the checksums of what it holds do."""
    torch.manual_seed(3)
    model = {
        "big": torch.rand(300, 300).view(torch.int32).bitwise_xor_(torch.randint(1 << 30, (300, 300)).int())
    }
    writer = FileSystemWriter(tmp_path / "saved", _extensions=[ZStandard()])
    folder = save(tmp_path / "saved", {"model": model}, storage_writer=writer)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    data = files["__0_0.distcp"]
    at = data.index(model["big"].numpy().tobytes()[4096:4160])
    for place in (at, 2):
        served = {f"/{file}": Behaviour(body) for file, body in files.items()}
        served["/__0_0.distcp"].flips = {place: 1}
        with bad_server(served) as server:
            state = State(module_of(model))
            receipt = load(
                server.url(""), state, options={"cache_dir": str(tmp_path / str(place))}, progress_bar=False
            ).receipt
        assert torch.equal(state.model.state_dict()["big"], model["big"])
        assert [one.name.rpartition("/")[2] for one in receipt.fetched_again] == ["__0_0.distcp"]
    served["/__0_0.distcp"].flips = {at: 9}
    with bad_server(served) as server, pytest.raises(CorruptError, match="It was fetched twice"):
        load(server.url(""), State(module_of(model)), options={"cache_dir": str(tmp_path / "twice")})


@pytest.mark.parametrize("to", ["safetensors", "dcp"])
def test_an_export_writes_again_what_it_wrote_of_damaged_bytes(
    to: str, source: tuple[bytes, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    data, wanted = source
    with bad_server({"/a": Behaviour(data, flips={in_weight(data): 1, in_header(data): 1})}) as server:
        exported = export_checkpoint(
            server.url("/a"), tmp_path / "out", to=to, options={"cache_dir": str(tmp_path / "cache")}
        )
        assert not any(server.objects["/a"].flips.values()), "the fault never fired"
    assert sum("were fetched twice" in note for note in exported.notes) == 2
    state = a_state(2)
    assert load(tmp_path / "out", state, load_weights_only=True, options={"verify": "before"}).receipt.files
    assert all(torch.equal(value, wanted[name]) for name, value in state.model.state_dict().items())
    names = [one.name for one in exported.files]
    assert sorted(names) == sorted(set(names))
    assert not list((tmp_path / "out").glob(".*part*"))


def test_read_fetches_again(source: tuple[bytes, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    data, wanted = source
    flips = {place(data): 1 for place in (in_moment, in_bias, in_header)}
    with bad_server({"/a": Behaviour(data, flips=flips)}) as server:
        found = read(server.url("/a"), progress_bar=False, options={"cache_dir": str(tmp_path)})
        assert not any(server.objects["/a"].flips.values()), "the fault never fired"
    assert all(torch.equal(value, wanted[name]) for name, value in found["state"]["model"].items())


def test_a_local_file_that_is_damaged_is_an_error_at_once(
    source: tuple[bytes, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    data = bytearray(source[0])
    data[in_weight(source[0])] ^= 1
    path = tmp_path / "a.pt"
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="take another copy of it") as raised:
        load(path, a_state(2), options={"verify": "before"})
    assert "fetched" not in raised.value.message
    assert list(tmp_path.iterdir()) == [path]
