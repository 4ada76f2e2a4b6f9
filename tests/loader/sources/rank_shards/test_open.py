"""Which files of one a rank are read, which are missed, and what is said of them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward_model import Awkward
from http_server import Served, counting_server
from places import DATA
from rankload.loader import (
    CorruptError,
    FormatError,
    LayoutError,
    MismatchError,
    NotFoundError,
    State,
    load,
    read,
)
from safetensors.torch import load_file

FOLDER = DATA / "rank-shards-w2"
MODEL, OPTIM, EXTRA = (f"{part}_world_size_2_rank_{{}}.pt" for part in ("model", "optim", "extra_state"))


def job(seed: int = 9) -> State:
    model = Awkward(seed)
    live = [one for one in model.parameters() if one.requires_grad]
    groups = [
        {"params": [one for one in live if one.dim() > 1], "weight_decay": 0.1},
        {"params": [one for one in live if one.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    return State(model, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 10))


def check(state: State, *, weights_only: bool = False) -> None:
    """Compares all tensors with what the job that saved them had, bit for bit."""
    wanted = load_file(FOLDER / "oracle.safetensors")
    found = {f"model/{name}": value for name, value in state.model.state_dict().items()}
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    for parameter, entry in state.optimizers[0].state.items():
        found |= {f"{key}/{names[parameter]}": value for key, value in entry.items()}
    wanted.pop("model/cache")  # no part of a state dict
    if weights_only:
        assert not state.optimizers[0].state
        wanted = {name: value for name, value in wanted.items() if name.startswith("model/")}
    assert found.keys() == wanted.keys()
    assert not [name for name, value in wanted.items() if not torch.equal(found[name], value)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "ckpt"))


def resave(path: Path, change: Callable[[Any], Any]) -> None:
    """Changes what a file holds. For that torch makes its meshes, which takes a process group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        torch.save(change(torch.load(path, weights_only=False)), path)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "path", ["", MODEL.format(0), MODEL.format(1), MODEL.format("{rank}")], ids=["folder", "0", "1", "template"]
)  # fmt: skip
def test_all_of_a_real_save_is_restored(path: str) -> None:
    state = job()
    result = load(FOLDER / path, state, progress_bar=False)
    check(state)
    assert state.schedulers[0].last_epoch == 3
    receipt = result.receipt
    assert (receipt.kind, receipt.layout, receipt.saved_world_size) == ("rank-shards", "hand-written", 2)
    assert (receipt.missing, receipt.unexpected, receipt.not_restored, result.extra) == ((), (), (), {})
    assert not receipt.notes
    assert all(file.verified for file in receipt.files)
    assert result.rng_states is not None
    assert random.Random(10).getstate() == result.rng_states[0]["python"]


def served(folder: Path) -> dict[str, Served]:
    return {f"/ckpt/{one.name}": Served(one.read_bytes()) for one in folder.iterdir()}


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("config", [True, False])
def test_over_http_each_needed_file_comes_once_and_no_other(
    folder: Path, weights_only: bool, config: bool
) -> None:
    if not config:
        (folder / "fsdp_config.json").unlink()
    expected = {MODEL.format(0), MODEL.format(1)}
    if not weights_only:
        # One rank has the random states of one.
        expected |= {OPTIM.format(0), OPTIM.format(1), EXTRA.format(0)}
    state = job()
    with counting_server(served(folder)) as server:
        load(server.url("/ckpt"), state, load_weights_only=weights_only, progress_bar=False)
        sent = {path.rpartition("/")[2]: n_bytes for path, n_bytes in server.bytes_sent.items()}
    check(state, weights_only=weights_only)
    sent.pop("fsdp_config.json", None)
    assert sent == {name: (folder / name).stat().st_size for name in expected}


@pytest.mark.parametrize(
    ("lost", "weights_only", "part"),
    [
        ([MODEL.format(1)], True, r"lacks the model files of saved rank 1, of 2: model_world_size_2_rank_1\.pt"),
        ([OPTIM.format(1)], False, r"lacks the optim files of saved rank 1, of 2: optim_"),
        ([OPTIM.format(0)], False, r"lacks the optim files of saved rank 0, of 2: optim_"),
        ([MODEL.format(0)], False, r"says that 2 ranks saved, and model_world_size_2_rank_0\.pt is not"),
    ],
)  # fmt: skip
def test_missing_ranks_are_named(folder: Path, lost: list[str], weights_only: bool, part: str) -> None:
    for name in lost:
        (folder / name).unlink()
    with pytest.raises(NotFoundError, match=part):
        load(folder, job(), load_weights_only=weights_only, progress_bar=False)
    if weights_only:
        with pytest.raises(NotFoundError, match="files of saved rank 1, of 2"):
            load(folder / MODEL.format("{rank}"), job(), load_weights_only=True, progress_bar=False)


def test_all_missing_ranks_are_named_at_once(folder: Path) -> None:
    for name in ("model_world_size_9_rank_0.pt", "model_world_size_9_rank_4.pt"):
        shutil.copy(folder / MODEL.format(0), folder / name)
    with pytest.raises(NotFoundError, match="saved ranks 1 to 3, 5 to 8, of 9"):
        load(folder / "model_world_size_9_rank_0.pt", job(), load_weights_only=True, progress_bar=False)


def test_a_save_without_some_parts_says_so(folder: Path) -> None:
    for name in (OPTIM.format(0), OPTIM.format(1), EXTRA.format(0), EXTRA.format(1)):
        (folder / name).unlink()
    with pytest.raises(MismatchError, match="optimizers/AdamW: the checkpoint has none"):
        load(folder, job(), progress_bar=False)
    state = job()
    with pytest.warns(UserWarning, match="the checkpoint has none"):
        result = load(folder, state, strict_model_weights=False, progress_bar=False)
    check(state, weights_only=True)
    assert result.rng_states is None
    assert result.receipt.notes == tuple(
        f"{folder} has no {part} files: what they would hold is not restored"
        for part in ("optim", "extra_state")
    )


def test_what_else_is_beside_the_states_is_returned(folder: Path) -> None:
    resave(folder / EXTRA.format(0), lambda extra: {**extra, "epoch": 4, "rng": None})
    result = load(folder, job(), progress_bar=False)
    assert (result.extra, result.epoch, result.rng_states) == ({"epoch": 4, "rng": None}, 4, None)
    torch.save([1, 2], folder / EXTRA.format(0))
    state = job()
    state.schedulers = []
    assert load(folder, state, progress_bar=False).extra == {"extra_state": [1, 2]}


def rename(folder: Path, ranks: int, *names: str) -> None:
    for name in names:
        (folder / name).rename(folder / name.replace("size_2", f"size_{ranks}"))


def test_files_of_more_ranks_than_their_names_say(folder: Path) -> None:
    rename(folder, 1, MODEL.format(0))
    (folder / "fsdp_config.json").unlink()
    with pytest.raises(CorruptError, match=r"rank_0\.pt: odd is a shard of 2 ranks, expected one of 1"):
        load(folder, job(), load_weights_only=True, progress_bar=False)
    (folder / "model_world_size_1_rank_0.pt").rename(folder / "model_world_size_0_rank_0.pt")
    with pytest.raises(LayoutError, match="is of 0 ranks, expected 1 to 16384"):
        load(folder / "model_world_size_0_rank_0.pt", job(), load_weights_only=True, progress_bar=False)


def test_two_copies_of_one_ranks_file(folder: Path) -> None:
    shutil.copy(folder / MODEL.format(0), folder / MODEL.format(1))
    with pytest.raises(
        CorruptError, match=r"rank_0\.pt and .*rank_1\.pt both hold the shard of model/odd at \(0,\)"
    ):
        load(folder, job(), load_weights_only=True, progress_bar=False)


@pytest.mark.parametrize(
    ("config", "read"),
    [
        ({"world_size": 2}, True),
        ({"fsdp_config": {"world_size": 2}}, True),
        ({"fsdp_config": 3}, True),
        ([], True),
        ("{", True),
        ({"world_size": True}, True),
        ({"world_size": 3}, False),
    ],
)
def test_the_number_of_ranks_is_in_a_file_beside_or_in_the_names(
    folder: Path, config: Any, read: bool
) -> None:
    (folder / "fsdp_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if read:
        load(folder, job(), progress_bar=False)
    else:
        with pytest.raises(NotFoundError, match="says that 3 ranks saved"):
            load(folder, job(), progress_bar=False)


def test_one_ranks_file_alone_is_refused_with_what_helps(folder: Path) -> None:
    one = folder / "one.pt"
    (folder / MODEL.format(0)).rename(one)
    with pytest.raises(MismatchError, match=r"model/odd: .*DTensor.* pass a path with \{rank\}"):
        load(one, job(), load_weights_only=True, progress_bar=False)
    with pytest.raises(FormatError, match="an optimizer's state_dict alone"):
        load(folder / OPTIM.format(0), job(), progress_bar=False)
    (folder / "n0").mkdir()
    shutil.copy(one, folder / "n0" / "ck.pt")
    with pytest.raises(LayoutError, match=r"saved by 2 ranks .* may use \{rank\} and \{run_name\} only"):
        load(folder / "n{node_rank}" / "ck.pt", job(), load_weights_only=True, progress_bar=False)


def test_files_of_each_rank_without_shards_are_read_as_before(tmp_path: Path) -> None:
    torch.save(job(3).model.state_dict(), tmp_path / "ck-0.pt")
    result = load(tmp_path / "ck-{rank}.pt", job(), load_weights_only=True, progress_bar=False)
    assert result.receipt.kind == "monolithic"


def with_seen(seen: float) -> Callable[[Any], Any]:
    """Changes a buffer among a rank's shards."""

    def change(tree: Any) -> Any:
        tree["seen"].fill_(seen)
        return tree

    return change


def test_buffers_that_differ_between_ranks_are_told(folder: Path) -> None:
    resave(folder / MODEL.format(1), with_seen(7))
    state = job()
    receipt = load(folder, state, progress_bar=False).receipt
    check(state)
    assert receipt.notes == (
        "not the same in all ranks' files, and taken from the lowest rank's: model/seen",
    )


def test_stages_of_a_pipeline_give_weights_and_no_numbered_state(folder: Path) -> None:
    resave(folder / MODEL.format(1), lambda tree: {**tree, "extra": torch.ones(2)})
    with pytest.raises(LayoutError, match=r"not all ranks hold model/extra, as in the stages of a pipeline"):
        load(folder, job(), progress_bar=False)
    state = job()
    state.model.extra = torch.nn.Parameter(torch.zeros(2))
    load(folder, state, load_weights_only=True, progress_bar=False)
    assert state.model.extra.tolist() == [1, 1]


def test_one_file_as_it_was_saved() -> None:
    assert read(FOLDER / EXTRA.format(1))["lr_scheduler"]["last_epoch"] == 3
    with pytest.raises(FormatError, match=r"DTensor, one rank's shard of a tensor"):
        read(FOLDER / MODEL.format(0))
    buffers = read(FOLDER / MODEL.format(0), ignore_keys=["*weight", "*bias", "odd", "gain"])
    assert buffers.keys() == {"seen", "count"}
