"""Weights that come to a node once: who provides what, and what happens where the masters tell other weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from deepspeed_ranks import ENVIRONMENT, needs_deepspeed
from hypothesis import given
from hypothesis import strategies as st
from processes import run_ranks
from rankload.loader.byte_ranges import union
from rankload.loader.cache.memory import available_bytes
from rankload.loader.cache.page_cache import is_cached
from rankload.loader.targets.deepspeed import weight_regions
from rankload.loader.targets.deepspeed.shared_memory import SharedMemory
from rankload.loader.targets.deepspeed.weight_regions import (
    APART,
    FILE,
    MASTERS,
    NodeShare,
    RegionOffer,
    deal_regions,
)
from rankload.loader.wire import decode, encode
from reshard_runs import save

NAME = ("model.pt", "data/0")


def bytes_of(ranges: Any) -> set[int]:
    return {at for start, stop in ranges for at in range(start, stop)}


RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted).map(tuple), max_size=6).map(
    union
)


@given(
    st.lists(st.tuples(st.integers(0, 1), RANGES), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from([None, 7]),
    st.booleans(),
)
def test_each_node_gets_every_byte_once(
    ranks: list[tuple[int, Any]], in_file: bool, crc: int | None, refuted: bool
) -> None:
    ranks.sort(key=lambda one: one[0])
    nodes = [node for node, _ in ranks]
    weights = tuple(union([span for node, own in ranks if node == 0 for span in own]))
    offers = [{NAME: RegionOffer(41, crc, in_file, weights, tuple(own))} for _, own in ranks]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_regions, "CELL_BYTES", 8)
        shares = deal_regions(offers, nodes, not_from_masters=frozenset({NAME} if refuted else ()))
    for node in set(nodes):
        here = [share.regions[NAME] for share, each in zip(shares, nodes, strict=True) if each == node]
        assert len({share.source for share in here}) == 1
        masters = {at for each, own in ranks if each == node for at in bytes_of(own)}
        whole = bool(weights) and masters == bytes_of(weights)
        provable = crc is not None or not in_file
        expected = MASTERS if whole and provable and not refuted else FILE if in_file else APART
        assert here[0].source == expected
        provided = [at for share in here for at in bytes_of(share.provide)]
        assert len(provided) == len(set(provided))
        wanted = bytes_of(weights) if expected == MASTERS else set(range(41)) if expected == FILE else set()
        assert set(provided) == wanted
        summed = [at for share in here for at in bytes_of(share.sums)]
        assert sorted(summed) == list(range(41))


def test_regions_do_not_overlap_in_the_image() -> None:
    names = [("model.pt", f"data/{index}") for index in range(3)]
    offers = [{name: RegionOffer(5000, 1, True, (), ()) for name in names}]
    (share,) = deal_regions(offers, [0])
    assert [share.regions[name].offset for name in names] == [0, 8192, 16384]
    assert share.image_bytes == 24576
    assert decode(NodeShare, json.loads(json.dumps(encode(share)))) == share


def test_an_image_is_seen_by_another_process_and_leaves_nothing(tmp_path: Path) -> None:
    with SharedMemory.make(10_000) as image:
        pid = os.fork()
        if pid == 0:
            with SharedMemory.open(
                image.handle.replace(str(os.getpid()), str(os.getppid())), 10_000
            ) as other:
                other.memory[9_999:] = b"x"
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert image.memory[9_998:] == b"\0x"
        with pytest.raises(OSError, match="expected 9999"):
            SharedMemory.open(image.handle, 9_999)
        handle = image.handle
    assert not os.path.exists(handle)
    assert available_bytes() > 0


# --- in real jobs ----------------------------------------------------------------------------------------------------


def restore(root: str, *names: str) -> None:
    """Every rank: restores each checkpoint into a new engine; tells notes, and whether the module is the file's.

    As if none of their files were in the page cache, but for that of ``cached``.
    """
    import reshard_worker
    import torch
    from rankload.loader import RankloadError, State, load
    from rankload.loader.targets.deepspeed import shared_weights

    reshard_worker.start_deepspeed()
    is_cached = shared_weights.is_cached
    shared_weights.is_cached = lambda path, start, stop: "cached" in path and is_cached(path, start, stop)
    for name in names:
        engine = reshard_worker.engine_of("1 bf16", seed=5)
        told: dict[str, Any]
        try:
            notes = load(f"{root}/{name}", State(engine)).receipt.notes
        except RankloadError as error:
            told = {"error": type(error).__name__, "message": str(error)}
        else:
            file = torch.load(f"{root}/{name}/global_step3/mp_rank_00_model_states.pt", weights_only=False)
            own = dict(engine.module.named_parameters())
            right = all(torch.equal(own[key], value) for key, value in file["module"].items() if key in own)
            told = {"notes": list(notes), "right": right}
        print(json.dumps(told), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def change_a_weight(folder: Path) -> None:
    """A module whose weights are not what its masters cast to, with right checksums."""
    import torch

    path = folder / "global_step3" / "mp_rank_00_model_states.pt"
    tree = torch.load(path, weights_only=False)
    tree["module"]["blocks.0.up.weight"][3, 5] += 1
    torch.save(tree, path)


def flip_a_weight(folder: Path) -> None:
    path = folder / "global_step3" / "mp_rank_00_model_states.pt"
    from rankload.loader.formats.torch_file import read_index

    index = read_index(path)
    largest = max(index.storages, key=lambda storage: storage.nbytes)
    data = bytearray(path.read_bytes())
    data[largest.offset + largest.nbytes // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from shutil import copytree

    root = tmp_path_factory.mktemp("shared")
    save(root, 2, ["1 bf16"])
    (root / "1-bf16-of-2").rename(root / "plain")
    copytree(root / "plain", root / "cached")
    for name, change in (("changed", change_a_weight), ("flipped", flip_a_weight)):
        copytree(root / "plain", root / name)
        change(root / name)
    return root


@needs_deepspeed
@pytest.mark.parametrize("nodes", [(2,), (1, 1)])
def test_the_module_file_is_read_where_the_masters_do_not_tell(saved: Path, nodes: tuple[int, ...]) -> None:
    """Cast from masters on one node that holds all of them; read, once per node, where they are apart or differ."""
    finished = run_ranks(
        f"{__file__}:restore",
        2,
        args=(saved, "plain", "changed", "cached", "flipped"),
        deadline_s=200,
        env=ENVIRONMENT,
        nodes=nodes,
    )
    assert [rank.returncode for rank in finished] == [0, 0], finished
    file = saved / "cached" / "global_step3" / "mp_rank_00_model_states.pt"
    cached_here = is_cached(str(file), 0, file.stat().st_size)
    for rank in finished:
        plain, changed, cached, flipped = (
            json.loads(line) for line in rank.stdout.splitlines() if line[:1] == "{"
        )
        assert plain["right"]
        assert changed["right"]
        assert cached["right"]
        cast = [note for note in plain["notes"] if "cast from the fp32 masters" in note]
        read = [note for note in plain["notes"] if "from the module's file once per node" in note]
        assert (bool(cast), bool(read)) == ((True, True) if nodes == (2,) else (False, True))
        if cached_here:
            assert not [note for note in cached["notes"] if "weights were" in note]
        # One group's weights are the masters', the other's are the file's.
        assert any("from the module's file once per node" in note for note in changed["notes"])
        if nodes == (2,):
            # The flipped bytes are not even read: the masters and the directory tell the right ones.
            assert flipped["right"] is False
        else:
            assert flipped["error"] == "PartialRestoreError"
            assert "CRC-32" in flipped["message"]
            assert "mp_rank_00_model_states.pt" in flipped["message"]
