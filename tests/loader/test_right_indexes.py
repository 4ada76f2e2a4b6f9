"""An index that came damaged, and that no checksum of its own proves: it is fetched again within the same load."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from bad_server import BadServer, Behaviour, bad_server
from rankload.loader.errors import UNPROVED, AccessError, CorruptError, PartialRestoreError, RankloadError
from rankload.loader.options import resolve_options
from rankload.loader.request import LoadRequest
from rankload.loader.right_indexes import RENEWED, with_right_indexes
from safetensors.torch import save
from torch import nn

from rankload import MismatchError, State, load, read

CACHED = {"cache_size": 1 << 28}


def module(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))


def the_same(one: nn.Module, two: nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )


def safetensors_file(**metadata: str) -> bytes:
    return save(
        {name: value.contiguous() for name, value in module(0).state_dict().items()}, metadata or None
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKLOAD_CACHE_DIR", str(tmp_path / "cache"))


def requests(server: BadServer) -> int:
    return len(server.asked)


@pytest.mark.parametrize("options", [{}, CACHED], ids=["no cache", "cache"])
def test_a_header_with_a_damaged_name(options: dict[str, int]) -> None:
    body = safetensors_file()
    at = body.index(b'"3.weight"') + 1
    with bad_server({"/m.safetensors": Behaviour(body, flips={at: 1})}) as server:
        restored = module(1)
        done = load(
            server.url("/m.safetensors"), State(model=restored), load_weights_only=True, options=options
        )
        assert the_same(restored, module(0))
        assert RENEWED in done.receipt.notes
        assert server.objects["/m.safetensors"].flips == {at: 0}
        # The cache holds what is right: a load that trusts it finds nothing wrong.
        again = load(
            server.url("/m.safetensors"), State(model=restored), load_weights_only=True, options=options
        )
        assert RENEWED not in again.receipt.notes


def test_metadata_with_a_damaged_name(tmp_path: Path) -> None:
    dcp.save({"model": module(0).state_dict()}, checkpoint_id=tmp_path / "ckpt")
    files = {f"/ckpt/{path.name}": Behaviour(path.read_bytes()) for path in (tmp_path / "ckpt").iterdir()}
    whole = files["/ckpt/.metadata"].body
    # The name is there several times, and where only one of them is damaged the file contradicts itself.
    files["/ckpt/.metadata"].flips = {at: 1 for at in range(len(whole)) if whole.startswith(b"3.weight", at)}
    with bad_server(files) as server:
        restored = module(1)
        done = load(server.url("/ckpt"), State(model=restored), load_weights_only=True, options=CACHED)
        assert the_same(restored, module(0))
        assert RENEWED in done.receipt.notes
        assert not any(files["/ckpt/.metadata"].flips.values())


def test_a_header_that_fits_and_a_file_that_differs_from_its_manifest() -> None:
    body = safetensors_file(written="by hand")
    at = body.index(b"hand")
    sums = f"{hashlib.sha256(body).hexdigest()}  m.safetensors\n".encode()
    with bad_server(
        {"/m.safetensors": Behaviour(body, flips={at: 1}), "/SHA256SUMS": Behaviour(sums)}
    ) as server:
        restored = module(1)
        done = load(server.url("/m.safetensors"), State(model=restored), load_weights_only=True)
        assert the_same(restored, module(0))
        assert RENEWED in done.receipt.notes
        server.objects["/m.safetensors"].flips[at] = 1
        tensors = read(server.url("/m.safetensors"))
        assert torch.equal(tensors["3.weight"], module(0).state_dict()["3.weight"])


@pytest.mark.parametrize("options", [{}, CACHED], ids=["no cache", "cache"])
def test_what_came_right_and_does_not_fit_is_fetched_twice_and_not_more(options: dict[str, int]) -> None:
    body = safetensors_file()
    with bad_server({"/m.safetensors": Behaviour(body)}) as server:
        for _ in range(2):
            before = requests(server)
            with pytest.raises(MismatchError, match=r"4\.weight") as raised:
                load(
                    server.url("/m.safetensors"),
                    State(model=nn.Sequential(*(nn.Linear(256, 256) for _ in range(5)))),
                    load_weights_only=True,
                    options=options,
                )
            asked = [one.range for one in server.asked[before:] if one.path == "/m.safetensors"]
            # One byte tells the version of what the cache has, and is the header's first.
            headers = [one for one in asked if re.match("bytes=[01]-", one) and one != "bytes=0-0"]
            assert 1 <= len(headers) <= 2, headers
            # One error is told, and not that it was found twice.
            assert not isinstance(raised.value.__context__, MismatchError)


def test_what_lies_on_a_disk_is_not_read_twice(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(safetensors_file())
    with pytest.raises(MismatchError) as raised:
        load(tmp_path / "m.safetensors", State(model=nn.Linear(2, 2)), load_weights_only=True)
    assert not raised.value.details.get("unproved")


def test_what_fails_the_second_time_keeps_its_cause_and_a_partial_restore_stays_one() -> None:
    def suspected(error: RankloadError) -> RankloadError:
        error.details[UNPROVED] = True
        return error

    def failing(*errors: RankloadError) -> Callable[[LoadRequest], None]:
        left = list(errors)

        def load_it(each: LoadRequest) -> None:
            assert each.renew_indexes == (len(left) < len(errors))
            raise left.pop(0) from OSError("its cause")

        return load_it

    request = LoadRequest("m.safetensors", None, resolve_options(None))
    mismatch, partial = suspected(MismatchError("names")), suspected(PartialRestoreError("half"))
    corrupt, access = CorruptError("bits"), AccessError("refused")
    for errors, raised in (
        ((mismatch, corrupt), corrupt),
        ((partial, access), partial),
        ((partial, PartialRestoreError("again")), None),
        ((corrupt,), corrupt),
    ):
        with pytest.raises(RankloadError) as told:
            with_right_indexes(request, failing(*errors))
        assert raised is None or told.value is raised
        assert isinstance(told.value, PartialRestoreError) == isinstance(errors[0], PartialRestoreError)
        assert isinstance(told.value.__cause__, OSError | AccessError)
