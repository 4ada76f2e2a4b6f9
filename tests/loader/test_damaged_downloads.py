"""What comes damaged, or is damaged in the cache, is fetched once more within the load, and the receipt says so."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_server import BadServer, Behaviour, bad_server
from rankload.loader import LoadResult, State, load

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


def in_header(data: bytes) -> int:
    """The first byte of a large storage's header."""
    return records(data)["data/0"][0]


def in_pickle(data: bytes) -> int:
    return records(data)["data.pkl"][1] + 40


def in_directory(data: bytes) -> int:
    """A byte of the zip's directory: its first record's method."""
    return data.rindex(b"PK\1\2", 0, data.rindex(b"PK\5\6")) + 10


PLACES: list[Callable[[bytes], int]] = [in_weight, in_moment, in_bias, in_header, in_pickle, in_directory]
WAYS = [("auto", "during"), ("node", "during"), ("node", "before")]


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
