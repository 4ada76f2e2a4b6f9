"""What `export_checkpoint` writes of every kind of checkpoint, compared bit for bit with what was saved."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from awkward_model import Awkward
from deepspeed_ranks import needs_deepspeed
from every_kind import KINDS, copy_kind, serving
from places import DATA, SUPPORT
from rankload.loader.alone import EVERYTHING, open_alone
from rankload.loader.exporting.export import Exported, export_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from zero_folders import unpack_zero

from rankload import CorruptError, FormatError, LayoutError, OptionError, State, load, read

Tensors = dict[str, torch.Tensor]
TORCH_TIES = {"lightning": "model.", "dcp": "", "dcp-tp": "", "rank-shards": ""}
"""Kinds whose files have a tied weight twice; and what the names begin with."""


def _model_of(saved: Tensors, prefix: str = "model/") -> Tensors:
    return {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}


def held(kind: str) -> Tensors:
    """The model as the job held it that saved, by the names in the checkpoint; by other means than rankload's."""
    if kind.startswith("zero"):
        folder = unpack_zero(int(kind[-1]), Path(os.environ["EXPORT_FOLDER"]) / kind)
        oracle = load_file(folder / "oracle.safetensors")
        low = {name: one.bfloat16() for name, one in _model_of(oracle, "module/").items()}
        fp32 = _model_of(oracle, "fp32/") if kind == "zero3" else {}
        buffers = _model_of(oracle, "buffer/")
        return {**low, **fp32, **buffers, "count": buffers["count"].long()}
    top = DATA / KINDS[kind].split("/")[0]
    if kind in ("trainer", "accelerate", "accelerate-zero"):
        return _model_of(torch.load(top / "held.pt", weights_only=True))
    if kind == "composer":
        return torch.load(DATA / KINDS[kind], weights_only=False)["state"]["model"]
    if kind == "composer-tar":
        with tarfile.open(DATA / KINDS[kind]) as archive:
            (member,) = [one for one in archive.getmembers() if one.isfile()]
            return torch.load(archive.extractfile(member), weights_only=False)["state"]["model"]
    if kind == "safetensors":
        saved = torch.load(top / "oracle.pt", weights_only=True)
        return {**_model_of(saved), **_model_of(saved, "extra/")}
    prefix = TORCH_TIES.get(kind, "")
    found = _model_of(load_file(top / "oracle.safetensors"))
    found.pop("cache", None)
    return {f"{prefix}{name}": value for name, value in found.items()}


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return (got.dtype, got.shape) == (expected.dtype, expected.shape) and torch.equal(
        got.reshape(-1).view(torch.uint8), expected.contiguous().reshape(-1).view(torch.uint8)
    )


def assert_equal(got: Tensors, expected: Tensors) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in got if not same(got[name], expected[name])] == []


def read_safetensors(folder: Path) -> Tensors:
    """As transformers reads a model: by the index where there is one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    stated = json.loads(index.read_text())
    found: Tensors = {}
    for name, file in stated["weight_map"].items():
        with safe_open(folder / file, framework="pt") as opened:
            assert opened.metadata()["format"] == "pt"
            found[name] = opened.get_tensor(name)
    assert stated["metadata"] == {"total_size": sum(one.nbytes for one in found.values())}
    return found


def read_dcp(folder: Path, prefix: str = "model.") -> Tensors:
    """By torch's own ``dcp.load``, into tensors of the shapes that the metadata states."""
    stated = torch_dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        key: torch.zeros(one.size, dtype=one.properties.dtype)
        for key, one in stated.items()
        if hasattr(one, "size")
    }
    torch_dcp.load(state, checkpoint_id=folder, no_dist=True)
    return _model_of(state, prefix)


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPORT_FOLDER", str(tmp_path_factory.mktemp("held")))
        yield


def files_of(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


ALIASES = {
    "zero1": {"head.weight": "wte.weight"},
    "zero3": {"head.weight": "wte.weight"},
    "rank-shards": {"head.weight": "wte.weight"},
    "accelerate-zero": {"lm_head.weight": "transformer.wte.weight"},
}
"""Names of tied weights that the files tell to be tied."""


@pytest.mark.parametrize("to", ["safetensors", "dcp"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("composer-zero")])
def test_every_kind_is_exported_bit_for_bit(kind: str, to: str, tmp_path: Path) -> None:
    source, out = copy_kind(kind, tmp_path / "in"), tmp_path / "out"
    done = export_checkpoint(source, out, to=to, max_shard_bytes=9000)
    expected, aliases = held(kind), ALIASES.get(kind, {})
    assert done.aliases == aliases
    if to == "safetensors":
        for alias, name in aliases.items():
            assert same(expected.pop(alias, expected[name]), expected[name])
        assert_equal(read_safetensors(out), expected)
        recorded: dict[str, str] = {}
        for file in out.glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                recorded.update(opened.metadata())
        assert recorded == {**aliases, "format": "pt"}
    else:
        assert_equal(read_dcp(out), expected | {alias: expected[name] for alias, name in aliases.items()})
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    assert {one.name: one.bytes for one in done.files} == {
        one.name: one.stat().st_size for one in out.iterdir() if one.name != "SHA256SUMS"
    }
    # And by rankload itself.
    with open_alone(out, EVERYTHING) as opened:
        assert opened.saved.state["model"].keys() == {*expected, *(aliases if to == "dcp" else ())}


@pytest.mark.parametrize("stage", [1, 3])
def test_composers_zero_archives_give_the_saved_forward_pass(stage: int, tmp_path: Path) -> None:
    folder = DATA / f"composer-zero{stage}-w2"
    export_checkpoint(folder / "ep1-ba4-rank{rank}.pt.tar", tmp_path / "out", dtype="fp32")
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    model.load_state_dict({name.removeprefix("module."): value for name, value in weights.items()})
    found = model(torch.linspace(-1, 1, 64).reshape(8, 8))
    expected = json.loads((folder / "expected.json").read_text())["forward_of_linspace"]
    assert torch.equal(found, torch.tensor(expected))


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 3])
def test_fp32_is_what_zero_to_fp32_makes_and_what_that_drops(stage: int, tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    source = unpack_zero(stage, tmp_path)
    theirs = dict(get_fp32_state_dict_from_zero_checkpoint(str(source)))
    done = export_checkpoint(source, tmp_path / "out", dtype="fp32")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert done.from_masters == 15
    assert done.casts == {"bfloat16 to float32": 1}  # the frozen weight, which has no master
    # Of stage 1 it drops the frozen weight. Of stage 3 it keeps that in its own dtype.
    dropped = {"frozen.weight"} if stage == 1 else set()
    assert ours.keys() == (theirs.keys() | dropped) - done.aliases.keys()
    for name in theirs.keys() & ours.keys():
        assert torch.equal(ours[name].float(), theirs[name].float()), name
    assert ours["count"].dtype == torch.int64
    assert same(ours["frozen.weight"], held(f"zero{stage}")["frozen.weight"].float())
    for alias, name in done.aliases.items():
        assert torch.equal(theirs[alias], ours[name])


@pytest.mark.parametrize("kind", ["dcp", "dcp-tp", "lightning"])
def test_it_is_what_dcp_to_torch_save_makes(kind: str, tmp_path: Path) -> None:
    source = copy_kind(kind, tmp_path)
    dcp_to_torch_save(source, tmp_path / "theirs.pt")
    theirs = torch.load(tmp_path / "theirs.pt", weights_only=False)
    export_checkpoint(source, tmp_path / "out")
    assert_equal(read_safetensors(tmp_path / "out"), theirs["state_dict" if kind == "lightning" else "model"])


def test_bf16_is_rounded_from_the_masters_where_the_weights_are_of_another_dtype(tmp_path: Path) -> None:
    for stage in (1, 3):
        source = unpack_zero(stage, tmp_path)
        done = export_checkpoint(source, tmp_path / f"out{stage}", dtype="bf16")
        found = load_file(tmp_path / f"out{stage}" / "model.safetensors")
        oracle = load_file(source / "oracle.safetensors")
        for name, one in _model_of(oracle, "module/").items():
            assert same(found[name], one.bfloat16()), name
        assert found["count"].dtype == torch.int64
        assert found["seen"].dtype == torch.bfloat16
        assert done.casts["float32 to bfloat16"] == (1 if stage == 1 else 16)
        assert ("fp32 masters" in done.left_out) == (stage == 1)


def test_no_file_is_larger_than_asked_for_but_by_one_tensor(tmp_path: Path) -> None:
    source = copy_kind("zero1", tmp_path)
    for to in ("safetensors", "dcp"):
        done = export_checkpoint(source, tmp_path / to, to=to, dtype="fp32", max_shard_bytes=8000)
        # The embedding alone takes more.
        large = [one.bytes for one in done.files if one.bytes > 8000 and not one.name.startswith(".")]
        assert [size // 97 // 24 for size in large] == [4]
        assert len(done.files) > 5
    one = export_checkpoint(source, tmp_path / "one")
    assert [file.name for file in one.files] == ["model.safetensors"]
    assert files_of(tmp_path / "one") == ["SHA256SUMS", "model.safetensors"]


def test_a_load_restores_an_export_with_its_tied_weights(tmp_path: Path) -> None:
    trained = Awkward(seed=3)
    torch.save({"model": trained.state_dict()}, tmp_path / "saved.pt")
    for to in ("safetensors", "dcp"):
        done = export_checkpoint(tmp_path / "saved.pt", tmp_path / to, to=to, max_shard_bytes=4000)
        assert done.aliases == {"head.weight": "wte.weight"}
        fresh = Awkward(seed=4)
        load(tmp_path / to, State(model=fresh))
        assert_equal(fresh.state_dict(), trained.state_dict())


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    for step in range(3):
        ids = torch.arange(12).reshape(2, 6) * (step + 1) % 53
        model(ids, ids.roll(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def job(seed: int) -> State:
    model = Awkward(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5])
    return State(model=model, optimizers=optimizer, schedulers=scheduler, run_name="a")


def test_everything_is_restored_from_a_dcp_folder(tmp_path: Path) -> None:
    from rankload import save_checkpoint

    state = job(1)
    train(state.model, state.optimizers[0], state.schedulers[0])
    save_checkpoint(
        tmp_path / "saved.pt", state, extra={"epoch": 2, "odd keys": {1: "one", 2: torch.ones(3)}}
    )
    done = export_checkpoint(
        tmp_path / "saved.pt", tmp_path / "out", to="dcp", everything=True, max_shard_bytes=9000
    )
    assert done.left_out == {}
    fresh = job(2)
    result = load(tmp_path / "out", fresh)
    assert_equal(fresh.model.state_dict(), state.model.state_dict())
    for part in ("optimizers", "schedulers"):
        (mine,), (theirs,) = getattr(fresh, part), getattr(state, part)
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert result.extra["epoch"] == 2
    assert torch.equal(result.extra["odd keys"]["2"], torch.ones(3))
    direct = load(tmp_path / "saved.pt", job(3))
    torch.testing.assert_close(result.rng_states[0]["torch"], direct.rng_states[0]["torch"], rtol=0, atol=0)
    assert result.rng_states[0]["python"] == direct.rng_states[0]["python"]


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 3])
def test_all_of_a_zero_checkpoint_is_restored_into_a_plain_job(stage: int, tmp_path: Path) -> None:
    from zero_model import TinyModel

    source = unpack_zero(stage, tmp_path)
    done = export_checkpoint(source, tmp_path / "out", to="dcp", dtype="fp32", everything=True)
    assert done.left_out.keys() == {"state/engine/loss_scaler"}
    model = TinyModel(seed=1)
    trained = [one for one in model.parameters() if one.requires_grad]
    decayed = [one for one in trained if one.ndim > 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": [o for o in trained if o.ndim < 2]}])
    result = load(tmp_path / "out", State(model=model, optimizers=optimizer))
    oracle = load_file(source / "oracle.safetensors")
    for name, one in model.named_parameters():
        if one.requires_grad:
            assert same(one.detach(), oracle[f"fp32/{name}"])
            for kind in ("exp_avg", "exp_avg_sq"):
                assert same(optimizer.state[one][kind], oracle[f"{kind}/{name}"])
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert "epoch" in result.extra


def test_everything_beside_safetensors_is_one_file_that_torch_and_read_take(tmp_path: Path) -> None:
    state = job(1)
    train(state.model, state.optimizers[0], state.schedulers[0])
    sparse = torch.eye(4).to_sparse()
    saved = {"model": state.model.state_dict(), "optimizer": state.optimizers[0].state_dict()}
    torch.save({**saved, "odd": {"sparse": sparse, 3: (torch.ones(2), "x")}}, tmp_path / "saved.pt")
    done = export_checkpoint(tmp_path / "saved.pt", tmp_path / "out", everything=True)
    assert done.left_out == {}
    theirs = torch.load(tmp_path / "out" / "training_state.pt", weights_only=True)
    ours = read(tmp_path / "out" / "training_state.pt")
    for found in (theirs, ours):
        (optimizer,) = found["state"]["optimizers"].values()
        torch.testing.assert_close(optimizer, saved["optimizer"], rtol=0, atol=0)
        assert torch.equal(found["odd"]["sparse"].to_dense(), torch.eye(4))
        assert torch.equal(found["odd"][3][0], torch.ones(2))
        assert "model" not in found["state"]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["odd"], state.model.odd)


def test_tensors_of_any_layout_and_size_keep_their_elements(tmp_path: Path) -> None:
    base = torch.arange(6_000_000, dtype=torch.float32)
    tensors = {
        "large": base.reshape(1000, 6000),
        "transposed": base.reshape(2000, 3000).t(),
        "part": base.reshape(1000, 6000)[:, 7:5007],
        "expanded": torch.arange(3.0).reshape(3, 1).expand(3, 1_000_000),
        "nothing": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "f8": torch.ones(5).to(torch.float8_e4m3fn),
        "u16": torch.arange(3, dtype=torch.int32).to(torch.uint16),
    }
    torch.save(tensors, tmp_path / "saved.pt")
    for to in ("safetensors", "dcp"):
        out = tmp_path / to
        export_checkpoint(tmp_path / "saved.pt", out, to=to)
        assert_equal(load_file(out / "model.safetensors") if to == "safetensors" else read_dcp(out), tensors)
        done = export_checkpoint(tmp_path / "saved.pt", tmp_path / f"{to}-bf16", to=to, dtype="bf16")
        assert done.casts == {"float32 to bfloat16": 6}
        assert export_checkpoint(out, tmp_path / f"{to}-again", to="safetensors").tensors == len(tensors)
        assert_equal(load_file(tmp_path / f"{to}-again" / "model.safetensors"), tensors)
    rounded = load_file(tmp_path / "safetensors-bf16" / "model.safetensors")
    assert same(rounded["transposed"], tensors["transposed"].bfloat16())


def test_what_safetensors_cannot_hold_is_said_and_dcp_keeps_it(tmp_path: Path) -> None:
    model = {
        "weight": torch.ones(3),
        "complex": torch.ones(2, dtype=torch.complex128),
        "sparse": torch.eye(4).to_sparse(),
        "norm._extra_state": {"scale": 3},
    }
    torch.save(model, tmp_path / "saved.pt")
    done = export_checkpoint(tmp_path / "saved.pt", tmp_path / "out")
    lost = {"state/model/complex", "state/model/sparse", "state/model/norm._extra_state"}
    assert done.left_out.keys() == {*lost, "all but the model"}
    assert "complex128" in done.left_out["state/model/complex"]
    assert "sparse" in done.left_out["state/model/sparse"]
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == ["weight"]
    done = export_checkpoint(tmp_path / "saved.pt", tmp_path / "dcp", to="dcp")
    assert done.left_out.keys() == {"all but the model"}
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=False)["model"]
    assert torch.equal(again["complex"], model["complex"])
    assert torch.equal(again["sparse"].to_dense(), torch.eye(4))
    assert again["norm._extra_state"] == {"scale": 3}


def test_names_change_and_parts_stay_away_as_asked_for(tmp_path: Path) -> None:
    source = DATA / KINDS["composer"]
    done = export_checkpoint(
        source,
        tmp_path / "out",
        options={"rename": {"module.": ""}},
        ignore_keys=["state/model/module.6.*"],
    )
    expected = {
        name.removeprefix("module."): value
        for name, value in held("composer").items()
        if not name.startswith("module.6.")
    }
    assert_equal(load_file(tmp_path / "out" / "model.safetensors"), expected)
    assert {"state/model/module.6.weight", "state/model/module.6.bias"} < done.left_out.keys()
    with pytest.raises(OptionError, match=r"'state/modle/\*' matches nothing"):
        export_checkpoint(source, tmp_path / "other", ignore_keys="state/modle/*")
    with pytest.raises(OptionError, match="would both become"):
        export_checkpoint(
            source, tmp_path / "other", options={"rename": {"module.0.weight": "a", "module.0.bias": "a"}}
        )
    with pytest.raises(OptionError, match="rename changes the names of weights alone"):
        export_checkpoint(source, tmp_path / "other", everything=True, options={"rename": {"module.": ""}})
    assert not (tmp_path / "other").exists()


def test_a_folder_that_is_not_empty_is_left_alone_without_force(tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = copy_kind("sharded", tmp_path)
    export_checkpoint(source, out, max_shard_bytes=1500)
    assert len(files_of(out)) > 5
    (out / "config.json").write_text("{}")
    before = {one.name: one.read_bytes() for one in out.iterdir()}
    with pytest.raises(OptionError, match=r"is not empty \(\d+ entries: SHA256SUMS, config\.json, .*--force"):
        export_checkpoint(source, out)
    assert {one.name: one.read_bytes() for one in out.iterdir()} == before
    export_checkpoint(source, out, to="dcp", force=True)
    assert files_of(out) == [".metadata", "SHA256SUMS", "__0_0.distcp", "config.json"]
    export_checkpoint(source, out, force=True)
    assert files_of(out) == ["SHA256SUMS", "config.json", "model.safetensors"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(OptionError, match="is a file"):
        export_checkpoint(source, tmp_path / "file", force=True)


def test_no_checkpoint_is_written_over_or_beside_one_that_comes_first(tmp_path: Path) -> None:
    source = Path(copy_kind("sharded", tmp_path))
    before = {one.name: one.read_bytes() for one in source.iterdir()}
    with pytest.raises(OptionError, match="own folder"):
        export_checkpoint(source, f"{source}/.", force=True)
    assert {one.name: one.read_bytes() for one in source.iterdir()} == before
    zero = unpack_zero(1, tmp_path)
    with pytest.raises(OptionError, match="another checkpoint"):
        export_checkpoint(source, zero, force=True)


@pytest.mark.parametrize("to", ["safetensors", "dcp"])
def test_damage_leaves_nothing_behind(to: str, tmp_path: Path) -> None:
    source = copy_kind("zero3", tmp_path / "in")
    (file,) = Path(source).glob("step3/*zero_pp_rank_2_*optim_states.pt")
    with open_alone(source, EVERYTHING) as opened:
        weight = opened.saved.masters["wte.weight"]
        (storage,) = {one for one in weight.storages if one.file == str(file)}
    data = bytearray(file.read_bytes())
    data[storage.offset + 40] ^= 1
    file.write_bytes(data)
    out = tmp_path / "out"
    with pytest.raises(CorruptError, match="CRC-32"):
        export_checkpoint(source, out, to=to, max_shard_bytes=5000)
    assert not out.exists()
    export_checkpoint(source, out, to=to, options={"verify": "off"})
    assert out.exists()


def test_what_is_no_model_or_is_split_is_refused(tmp_path: Path) -> None:
    torch.save({"optimizer": {"state": {}, "param_groups": []}}, tmp_path / "saved.pt")
    with pytest.raises(FormatError):
        export_checkpoint(tmp_path / "saved.pt", tmp_path / "out")
    with pytest.raises(OptionError, match="expected one of safetensors, dcp"):
        export_checkpoint(tmp_path / "saved.pt", tmp_path / "out", to="gguf")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="http"):
        export_checkpoint(DATA / KINDS["composer"], "https://host/out?token=secret")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["safetensors", "dcp"])
@pytest.mark.parametrize("kind", ["zero1", "zero3", "dcp-tp", "composer-tar", "sharded", "rank-shards"])
def test_from_a_store_and_to_a_store(kind: str, to: str, tmp_path: Path) -> None:
    source = copy_kind(kind, tmp_path / "in")
    memory = fsspec.filesystem("memory")
    with serving(tmp_path / "in") as server:
        url = server.url(f"/{Path(source).relative_to(tmp_path / 'in')}")
        options = {"cache_dir": str(tmp_path / "cache")}
        done = export_checkpoint(
            url,
            f"memory://export/{kind}",
            to=to,
            max_shard_bytes=9000,
            options=options,
            out_storage_options={},
        )
    try:
        out = tmp_path / "out"
        memory.get(f"/export/{kind}", str(out), recursive=True)
    finally:
        memory.rm("/export", recursive=True)
    assert done.out == f"memory:///export/{kind}"
    expected = held(kind)
    found = read_safetensors(out) if to == "safetensors" else read_dcp(out)
    for alias in done.aliases:
        expected.pop(alias, None)
        found.pop(alias, None)
    assert_equal(found, expected)
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=out, check=True)


@pytest.mark.parametrize("to", ["safetensors", "dcp"])
def test_only_what_is_exported_is_fetched(to: str, tmp_path: Path) -> None:
    model = {f"layer{number}": torch.randn(600, 512) for number in range(4)}
    moments = {number: {"exp_avg": torch.randn(600, 512)} for number in range(4)}
    (tmp_path / "in").mkdir()
    torch.save({"model": model, "optimizer": {"state": moments}}, tmp_path / "in" / "saved.pt")
    torch_dcp.save(
        {"model": model, "optimizer": moments}, checkpoint_id=tmp_path / "in" / "dcp", no_dist=True
    )
    for source in ("saved.pt", "dcp"):
        with serving(tmp_path / "in") as server:
            export_checkpoint(
                server.url(f"/{source}"),
                tmp_path / source / to,
                to=to,
                max_shard_bytes=2_500_000,
                options={"cache_dir": str(tmp_path / "cache")},
                ignore_keys=["state/model/layer0"],
            )
            sent = server.sent_bytes
        out = tmp_path / source / to
        found = read_safetensors(out) if to == "safetensors" else read_dcp(out)
        assert_equal(found, {name: one for name, one in model.items() if name != "layer0"})
        wanted = 3 * 600 * 512 * 4
        # Of 8 such tensors; the item of one that is left out may come with its index.
        assert wanted < sent < wanted + 2 * 600 * 512 * 4


def test_an_export_in_a_store_is_replaced_whole(tmp_path: Path) -> None:
    source = copy_kind("sharded", tmp_path)
    memory = fsspec.filesystem("memory")
    try:
        export_checkpoint(source, "memory://export/a", max_shard_bytes=1500)
        with pytest.raises(OptionError, match="is not empty"):
            export_checkpoint(source, "memory://export/a")
        export_checkpoint(source, "memory://export/a", force=True)
        names = sorted(Path(one).name for one in memory.ls("/export/a", detail=False))
        assert names == ["SHA256SUMS", "model.safetensors"]
        fresh = Awkward(seed=4)
        load("memory://export/a", State(model=fresh))
        assert_equal({k: v for k, v in fresh.state_dict().items() if k != "head.weight"}, held("sharded"))
    finally:
        memory.rm("/export", recursive=True)


@pytest.mark.takes_long
@pytest.mark.parametrize(
    ("replaces", "scheme", "to"),
    [
        (False, "", "safetensors"),
        (True, "", "safetensors"),
        (True, "", "dcp"),
        (True, "disk://", "safetensors"),
        (False, "disk://", "dcp"),
    ],
)
def test_a_kill_at_any_step_leaves_nothing_or_a_whole_export(
    replaces: bool, scheme: str, to: str, tmp_path: Path
) -> None:
    source, before = copy_kind("sharded", tmp_path), ""
    if replaces:
        before = str(tmp_path / "before")
        other = Awkward(seed=8)
        torch.save(other.state_dict(), tmp_path / "other.pt")
        # Of other files, and of as many: those of the two would fit each other by their names.
        export_checkpoint(tmp_path / "other.pt", before, to=to, max_shard_bytes=4000)
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "export_worker.py"), source, f"{scheme}{tmp_path}/out", to, before],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert len(outcomes) > 10
    assert set(outcomes) <= {"old", "nothing", "new"}
    # On this node an export before stays until the new one is on the disk; in a store it makes room first.
    order = ["old", "nothing", "new"] if replaces else ["nothing", "new"]
    assert outcomes == sorted(outcomes, key=order.index)
    assert (outcomes.count("old") > 10) == (replaces and not scheme)


def test_it_says_what_it_did(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = export_checkpoint(
        copy_kind("zero1", tmp_path),
        tmp_path / "out",
        dtype="fp32",
        on_progress=lambda now, total: seen.append((now, total)),
    )
    assert isinstance(done, Exported)
    assert seen[-1] == (done.tensor_bytes, done.tensor_bytes)
    assert [now for now, _ in seen] == sorted(now for now, _ in seen)
    assert (done.kind, done.step, done.tensors, done.from_masters) == ("deepspeed", 3, 18, 15)
    told = json.loads(json.dumps(done.as_dict()))
    assert told["files"][0]["name"] == "model.safetensors"
    assert told["left_out"] == {
        "all but the model": "weights and buffers are exported; --all exports the rest too"
    }


def test_elements_that_no_file_has_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "dcp"
    torch_dcp.save({"model": {"weight": torch.ones(4, 4)}}, checkpoint_id=folder, no_dist=True)
    save_file({"other": torch.ones(2)}, tmp_path / "model.safetensors")
    shutil.copy(tmp_path / "model.safetensors", folder / "__0_0.distcp")
    with pytest.raises((CorruptError, FormatError, LayoutError)):
        export_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
