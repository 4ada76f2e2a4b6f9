"""DCP folders of every program's form, opened in one process."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dcp_folders import assert_same, job_of, module_of, save, tensors_of
from modules_worker import oracle_of, plain_job, train
from places import DATA
from rankload.loader import (
    CorruptError,
    FormatError,
    MismatchError,
    NotFoundError,
    RankloadError,
    State,
    load,
)
from torch import nn
from torch.distributed.checkpoint._extension import StreamTransformExtension, ZStandard
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
)

pytest.importorskip("safetensors")


def trained_job(seed: int = 3, scheduler: Any = None) -> State:
    state = plain_job(seed)
    state.schedulers = [scheduler or torch.optim.lr_scheduler.MultiStepLR(state.optimizers[0], [3, 5])]
    for _ in range(2):
        train(state, 1)
        state.schedulers[0].step()
    return state


def fresh_job(seed: int = 9) -> State:
    state = plain_job(seed)
    state.schedulers = [torch.optim.lr_scheduler.MultiStepLR(state.optimizers[0], [30])]
    return state


def goes_on(state: State, saved: State) -> None:
    """Whether `state` is `saved`, and trains on as that does."""
    assert_same(tensors_of(state), tensors_of(saved))
    mine, theirs = state.optimizers[0].state_dict(), saved.optimizers[0].state_dict()
    for one, other in zip(mine["param_groups"], theirs["param_groups"], strict=True):
        assert {key: value for key, value in one.items() if key != "params"} == {
            key: value for key, value in other.items() if key != "params"
        }
    if state.schedulers:
        assert state.schedulers[0].state_dict() == saved.schedulers[0].state_dict()
    assert train(state) == train(saved)


# --- what programs write --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prefix", "layout"),
    [
        ("dcp-fsdp2-w2", "", "hand-written"),
        ("dcp-tp-fsdp-w4", "", "hand-written"),
        ("lightning-mp-w2", "model.", "lightning"),
    ],
)
def test_real_folders(name: str, prefix: str, layout: str) -> None:
    oracle = oracle_of(DATA / name)
    del oracle["model/cache"]  # a buffer that is not persistent
    state = job_of(oracle, prefix)
    result = load(str(DATA / name / "ckpt"), state)
    assert_same(tensors_of(state, prefix), oracle)
    assert state.schedulers[0].last_epoch == 3
    assert [group["weight_decay"] for group in state.optimizers[0].param_groups] == [0.1, 0.0]
    receipt = result.receipt
    assert (receipt.kind, receipt.layout) == ("dcp", layout)
    assert not (receipt.missing + receipt.unexpected + receipt.not_restored)
    assert {one.name.rpartition("/")[2] for one in receipt.files if not one.verified_by} == {".metadata"}
    if name == "dcp-fsdp2-w2":
        assert result.rng_states is not None
        assert len(result.rng_states) == 1
        assert result.extra["step"] == 3
        assert result.extra["odd"]["tuple"] == (1, 2)
        assert torch.equal(result.extra["odd"]["int_keys"]["7"], torch.ones(3))
        assert torch.equal(result.extra["odd"]["list_of_tensors"][0], torch.ones(2))
    if layout == "lightning":
        assert (result.extra["epoch"], result.extra["global_step"]) == (0, 3)


@pytest.mark.parametrize("form", ["by name", "by number", "flattened", "titan", "composer", "old composer"])
def test_the_forms_of_programs(form: str, tmp_path: Path) -> None:
    saved = trained_job()
    model, optimizer = saved.model, saved.optimizers[0]
    weights, by_name = get_state_dict(model, optimizer)
    scheduler = saved.schedulers[0].state_dict()
    flat = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)
    )
    rng = [{"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}]
    composer = {"model": weights, "schedulers": {"MultiStepLR": scheduler}, "run_name": "a"}
    tree: dict[str, Any] = {
        "by name": {"model": weights, "optim": by_name, "lr_scheduler": scheduler},
        "by number": {
            "model_state_dict": model.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "scheduler": scheduler,
        },
        "flattened": {"model": weights, "optimizer": flat, "scheduler": scheduler},
        "titan": {
            **get_model_state_dict(model),
            "optimizer": flat,
            "lr_scheduler": scheduler,
            "train_state": {"step": torch.tensor(2)},
            "dataloader": {"dp_rank_0": b"abc", "world_size": 1},
        },
        "composer": {"state": {**composer, "optimizers": {"AdamW": by_name}}, "rng": rng},
        "old composer": {"state": composer, "optimizers": {"AdamW": by_name}, "rng": rng},
    }[form]
    save(tmp_path / "step-2", tree)
    state = fresh_job()
    result = load(str(tmp_path / "step-2"), state)
    assert not (result.receipt.missing + result.receipt.unexpected + result.receipt.not_restored)
    assert result.receipt.layout == ("composer" if "composer" in form else "hand-written")
    if form == "titan":
        assert result.extra["dataloader"] == {"dp_rank_0": b"abc", "world_size": 1}
        assert int(result.extra["train_state"]["step"]) == 2
    if "composer" in form:
        assert result.rng_states is not None
    goes_on(state, saved)


def test_lightning_without_what_lies_beside(tmp_path: Path) -> None:
    """A save that ended before ``meta.pt``: the schedulers are missing, and that is said."""
    shutil.copytree(DATA / "lightning-mp-w2/ckpt", tmp_path / "ckpt")
    (tmp_path / "ckpt/meta.pt").unlink()
    oracle = oracle_of(DATA / "lightning-mp-w2")
    del oracle["model/cache"]
    state = job_of(oracle, "model.")
    with pytest.raises(MismatchError, match="schedulers/LinearLR"):
        load(str(tmp_path / "ckpt"), state)
    with pytest.warns(UserWarning, match="schedulers/LinearLR"):
        load(str(tmp_path / "ckpt"), state, strict_model_weights=False)
    assert_same(tensors_of(state, "model."), oracle)


def test_accelerates_two_folders(tmp_path: Path) -> None:
    saved = trained_job()
    weights, optimizer = get_state_dict(saved.model, saved.optimizers[0])
    save(tmp_path / "checkpoint-2/pytorch_model_fsdp_0", {"model": weights})
    save(tmp_path / "checkpoint-2/optimizer_0", {"optimizer": optimizer})
    state = plain_job(9)
    result = load(str(tmp_path / "checkpoint-2"), state)
    assert {Path(one.name).parent.name for one in result.receipt.files} == {
        "pytorch_model_fsdp_0",
        "optimizer_0",
    }
    saved.schedulers = []
    goes_on(state, saved)
    alone = plain_job(8)
    load(str(tmp_path / "checkpoint-2/pytorch_model_fsdp_0"), alone, load_weights_only=True)
    with pytest.raises(FormatError, match="its layout is not known"):
        load(str(tmp_path / "checkpoint-2/optimizer_0"), alone)


def test_a_bare_state_dict_and_one_that_was_not_flattened(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    save(tmp_path / "bare", module.state_dict())
    from torch.distributed.checkpoint import DefaultSavePlanner

    whole = {"model": module.state_dict(), "epoch": 7}
    save(tmp_path / "whole", whole, planner=DefaultSavePlanner(flatten_state_dict=False))
    for name, weights_only in (("bare", False), ("bare", True), ("whole", False), ("whole", True)):
        other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        result = load(str(tmp_path / name), State(other), load_weights_only=weights_only)
        assert_same(other.state_dict(), module.state_dict())
        assert result.extra == ({"epoch": 7} if name == "whole" else {})


def test_an_optimizer_without_state(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    save(tmp_path / "it", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    own = torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=1.0)
    load(str(tmp_path / "it"), State(nn.Linear(3, 2), own))
    assert own.param_groups[0]["lr"] == 0.25


# --- tensors ---------------------------------------------------------------------------------------------------------


class Stated(nn.Module):
    """A submodule with extra state."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


def test_every_dtype_and_stride(tmp_path: Path) -> None:
    torch.manual_seed(1)
    dtypes = [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float8_e4m3fn,
        torch.complex64,
    ]
    integers = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool]
    tensors = {f"a.{str(one)[6:]}": torch.randn(5, 3).to(one) for one in dtypes}
    tensors |= {f"b.{str(one)[6:]}": torch.randint(0, 2, (4,)).to(one) for one in integers}
    tensors["turned"] = torch.randn(3, 4).t()
    tensors["last"] = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tensors["number"] = torch.tensor(2.5)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["part"] = torch.randn(9, 9)[2:5, 3:7]
    save(tmp_path / "it", tensors)
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name.replace(".", "_"), torch.zeros_like(tensor))
    load(
        str(tmp_path / "it"),
        State(module),
        options={"rename": {"a.": "a_", "b.": "b_"}},
    )
    for name, tensor in tensors.items():
        got = module.get_buffer(name.replace(".", "_"))
        assert got.dtype == tensor.dtype, name
        if "float8" in name:
            got, tensor = got.view(torch.uint8), tensor.view(torch.uint8)
        assert torch.equal(got, tensor), name


def test_chunks_that_are_no_tensor(tmp_path: Path) -> None:
    """Some that overlap, one that is missing, and more corners than can be counted."""
    folder = save(tmp_path / "it", {"w": torch.ones(4, 2), "a": torch.ones(())})
    good = pickle.loads((folder / ".metadata").read_bytes())
    item = good.storage_data[MetadataIndex("w", torch.Size((0, 0)))]
    for boxes, message in (
        ([((0, 0), (2, 2)), ((1, 0), (2, 2))], "do not make a tensor"),
        ([((0, 0), (2, 2))], "hold 4 of 8"),
        ([], "hold 0 of 8"),
        ([((0, 0), (4, 2))] * 2, ""),
    ):
        good.state_dict_metadata["w"].chunks = [
            ChunkStorageMetadata(torch.Size(starts), torch.Size(sizes)) for starts, sizes in boxes
        ]
        good.storage_data |= {MetadataIndex("w", torch.Size(starts)): item for starts, _ in boxes}
        (folder / ".metadata").write_bytes(pickle.dumps(good))
        module = module_of({"w": torch.zeros(4, 2)})
        if message:
            with pytest.raises(CorruptError, match=f"{message}|expected a tensor"):
                load(str(folder), State(module), load_weights_only=True, strict_model_weights=False)
        else:
            load(str(folder), State(module), load_weights_only=True, strict_model_weights=False)
            assert torch.equal(module.w, torch.ones(4, 2))
    many = torch.Size((1,) * 40)
    zeros = torch.Size((0,) * 40)
    good.state_dict_metadata["w"].size = many
    good.state_dict_metadata["w"].chunks = [ChunkStorageMetadata(zeros, many)]
    good.storage_data[MetadataIndex("w", zeros)] = item
    (folder / ".metadata").write_bytes(pickle.dumps(good))
    with pytest.raises(FormatError, match="40 dimensions"):
        load(str(folder), State(module), load_weights_only=True)


def test_extra_state_and_tied_weights(tmp_path: Path) -> None:
    saved = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), Stated({"a": torch.ones(2), "b": 3}))
    saved[1].weight = saved[0].weight
    save(tmp_path / "it", {"model": saved.state_dict(), "seen": 1})
    for weights_only in (True, False):
        own = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), Stated(None))
        own[1].weight = own[0].weight
        load(str(tmp_path / "it"), State(own), load_weights_only=weights_only)
        assert torch.equal(own[0].weight, saved[0].weight)
        assert own[2].value["b"] == 3
        assert torch.equal(own[2].value["a"], torch.ones(2))


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.fixture
def simple(tmp_path: Path) -> Path:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    return save(tmp_path / "simple", {"model": weights, "optim": moments, "step": 1})


def own_job(*sizes: int) -> State:
    first, second, third = sizes or (6, 5, 4)
    model = nn.Sequential(nn.Linear(first, second), nn.Linear(second, third))
    return State(model, torch.optim.AdamW(model.parameters()))


def test_shapes_and_names_that_differ(simple: Path) -> None:
    with pytest.raises(MismatchError, match=r"model/1.weight: expected shape \(3, 5\), got \(4, 5\)"):
        load(str(simple), own_job(6, 5, 3))
    state = own_job()
    state.model.add_module("2", nn.Linear(4, 1))
    with pytest.raises(MismatchError, match=r"model/2\.weight"):
        load(str(simple), state)


def test_folders_that_are_not_whole(simple: Path, tmp_path: Path) -> None:
    def changed(name: str) -> Path:
        shutil.copytree(simple, tmp_path / name)
        return tmp_path / name

    folder = changed("missing")
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(NotFoundError, match=r"__0_0\.distcp"):
        load(str(folder), own_job())
    folder = changed("short")
    data = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(data[:-1])
    with pytest.raises(CorruptError, match=r"is to end at byte .*cut short"):
        load(str(folder), own_job())
    folder = changed("unfinished")
    (folder / ".metadata").rename(folder / ".metadata.tmp")
    with pytest.raises(FormatError, match="not finished"):
        load(str(folder), own_job())
    folder = changed("cut")
    (folder / ".metadata").write_bytes((simple / ".metadata").read_bytes()[:-9])
    with pytest.raises(CorruptError):
        load(str(folder), own_job())
    folder = changed("by rank")
    (folder / ".metadata").rename(folder / "__0.metadata")
    with pytest.raises(FormatError, match="use_collectives=False"):
        load(str(folder), own_job())


def test_a_path_may_name_the_metadata(simple: Path) -> None:
    load(str(simple / ".metadata"), own_job())
    with pytest.raises(FormatError, match="pass the folder"):
        load(str(simple / "__0_0.distcp"), own_job())


def test_files_of_another_save(simple: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other", {"model": own_job(4, 5, 6).model.state_dict()})
    data = (other / "__0_0.distcp").read_bytes()
    size = (simple / "__0_0.distcp").stat().st_size
    (simple / "__0_0.distcp").write_bytes(data.ljust(size, b"\0"))
    with pytest.raises(RankloadError):
        load(str(simple), own_job())


class Reversed(StreamTransformExtension):
    """An extension of one's own; it changes nothing."""

    def get_descriptor(self) -> str:
        return "stream.reversed/1"

    @staticmethod
    def registry_name() -> str:
        return "stream.reversed"

    @staticmethod
    def from_descriptor(version: str) -> Reversed:
        return Reversed()

    def transform_to(self, output: Any) -> Any:
        return output

    def transform_from(self, stream: Any) -> Any:
        return stream


@pytest.mark.skipif(not ZStandard.is_available(), reason="zstandard is not installed")
def test_items_that_zstd_compressed(tmp_path: Path) -> None:
    saved = trained_job()
    weights, optimizer = get_state_dict(saved.model, saved.optimizers[0])
    parts = {"model": weights, "optim": optimizer, "scheduler": saved.schedulers[0].state_dict()}
    writer = FileSystemWriter(tmp_path / "it", _extensions=[ZStandard()])
    folder = save(tmp_path / "it", parts, storage_writer=writer)
    state = fresh_job()
    receipt = load(str(folder), state).receipt
    assert [one.verified_by for one in receipt.files if one.name.endswith(".distcp")] == [("zip CRC-32",)]
    goes_on(state, saved)
    data = bytearray((folder / "__0_0.distcp").read_bytes())
    for at in range(len(data) // 2, len(data) // 2 + 40):
        data[at] ^= 0x55
    (folder / "__0_0.distcp").write_bytes(data)
    with pytest.raises(RankloadError):
        load(str(folder), fresh_job())


def test_items_in_other_forms_are_refused_by_name(tmp_path: Path) -> None:
    weights = {"model": own_job().model.state_dict()}
    writer = FileSystemWriter(tmp_path / "other", _extensions=[Reversed()])
    folder = save(tmp_path / "other", weights, storage_writer=writer)
    with pytest.raises(FormatError, match=r"stream.reversed/1.*not supported"):
        load(str(folder), own_job(), load_weights_only=True)
    writer = FileSystemWriter(tmp_path / "safe", serialization_format=SerializationFormat.SAFETENSORS)
    folder = save(tmp_path / "safe", {"model": {"w": torch.ones(3)}}, storage_writer=writer)
    with pytest.raises(FormatError, match="a safetensors file"):
        load(str(folder), State(module_of({"w": torch.ones(3)})))


# --- damage -----------------------------------------------------------------------------------------------------------


def test_every_flipped_byte_of_a_tensor_is_found(simple: Path) -> None:
    """And one anywhere else is found, or changes nothing that is restored; torch's own reader finds few of them."""
    path = simple / "__0_0.distcp"
    good = path.read_bytes()
    reference = own_job()
    load(str(simple), reference)
    expected = tensors_of(reference)
    at_random = random.Random(5)
    found = 0
    flips = 2_000 if os.environ.get("TEST_ALL") else 100
    for _ in range(flips):
        bad = bytearray(good)
        at = at_random.randrange(len(good))
        bad[at] ^= 1 << at_random.randrange(8)
        path.write_bytes(bad)
        state = own_job()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load(str(simple), state)
        except RankloadError:
            found += 1
        else:
            assert_same(tensors_of(state), expected)
    assert found > 0.3 * flips
    path.write_bytes(good)


def test_times_of_two_saves_warn(tmp_path: Path) -> None:
    model = own_job().model
    folder = save(
        tmp_path / "it",
        {"model": model.state_dict()},
        storage_writer=FileSystemWriter(tmp_path / "it", single_file_per_rank=False),
    )
    first, *others = sorted(folder.glob("*.distcp"))
    finished = (folder / ".metadata").stat().st_mtime
    for path in others:
        os.utime(path, (finished - 1, finished - 1))
    for later, warned in ((30, False), (90, True)):
        os.utime(first, (finished + later, finished + later))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            receipt = load(str(folder), State(own_job().model), load_weights_only=True).receipt
        assert any("two saves" in str(one.message) for one in caught) is warned
        assert any("two saves" in note for note in receipt.notes) is warned
    for path in others:
        os.utime(path, (finished + 90, finished + 90))
    assert not load(str(folder), State(own_job().model), load_weights_only=True).receipt.notes


def test_a_manifest_tells_two_saves_apart(simple: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in simple.iterdir())
    lines = [f"{hashlib.sha256((simple / name).read_bytes()).hexdigest()}  {name}" for name in names]
    (simple / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    result = load(str(simple), own_job(), options={"verify": "before"})
    assert {one.name.rpartition("/")[2]: one.verified_by for one in result.receipt.files} == {
        ".metadata": ("sha256 of SHA256SUMS",),
        "__0_0.distcp": ("zip CRC-32", "sha256 of SHA256SUMS"),
    }
    other = save(tmp_path / "again", {"model": own_job().model.state_dict()})
    (simple / ".metadata").write_bytes((other / ".metadata").read_bytes())
    with pytest.raises(CorruptError, match="SHA256SUMS"):
        load(str(simple), own_job(), load_weights_only=True, options={"verify": "before"})


class OwnState:
    """A state that loads itself, as Composer's does."""

    def __init__(self, job: State) -> None:
        self.model, self.optimizers, self.schedulers = job.model, job.optimizers, job.schedulers
        self.timestamp = None

    def load_state_dict(self, state: dict[str, Any], logger: Any, **options: Any) -> None:
        assert "optimizers" not in state
        self.schedulers[0].load_state_dict(state["schedulers"]["LinearLR"])

    def load_model_state(self, state_dict: dict[str, Any], logger: Any, **options: Any) -> None: ...


def test_a_state_that_loads_itself() -> None:
    oracle = oracle_of(DATA / "dcp-fsdp2-w2")
    del oracle["model/cache"]
    job = job_of(oracle)
    load(str(DATA / "dcp-fsdp2-w2/ckpt"), OwnState(job))
    assert_same(tensors_of(job), oracle)
    assert job.schedulers[0].last_epoch == 3
