"""Weights in safetensors files: one, several with an index, or torch's slices of each rank."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward_model import EXTRAS, FOLDERS, Awkward, check, checkpoint, oracle
from http_server import Served, counting_server
from rankload.loader import (
    CorruptError,
    FormatError,
    MismatchError,
    NotFoundError,
    RankloadError,
    State,
    UnsafeError,
    load,
)
from safetensors_files import as_safetensors, save_in_files

INDEX = "model.safetensors.index.json"
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("verify", ["before", "during", "off"])
def test_real_folders_restore_to_what_was_saved(folder: str, verify: str) -> None:
    model = Awkward()
    result = load(
        checkpoint(folder),
        State(model),
        ignore_keys=list(EXTRAS) if "single" in folder else None,
        options={"verify": verify},
    )
    check(model, oracle(folder))
    assert model.head.weight is model.wte.weight
    receipt = result.receipt
    assert receipt.layout == "safetensors"
    assert (
        receipt.kind == {"s": "monolithic", "d": "slices"}[folder[0]] if folder != FOLDERS[1] else "sharded"
    )
    # There is no checksum to compare with, and the receipt says so.
    assert set(receipt.unverified) == {file.name for file in receipt.files}
    assert all(file.verified_by == () for file in receipt.files)


@pytest.mark.parametrize("folder", FOLDERS)
def test_modules_on_the_meta_device_and_casts(folder: str) -> None:
    with torch.device("meta"):
        model = Awkward(low=torch.float16)
    ignored = list(EXTRAS) if "single" in folder else None
    result = load(checkpoint(folder), State(model), load_weights_only=True, ignore_keys=ignored)
    check(model, oracle(folder))
    assert result.receipt.cast == {"model/low.weight": "bfloat16 -> float16"}


def test_a_file_is_what_its_folder_means(tmp_path: Path) -> None:
    for folder, name in zip(
        FOLDERS, ("model.safetensors", INDEX, "shard-00002-model-00001-of-00001.safetensors"), strict=True
    ):
        model = Awkward()
        load(
            checkpoint(folder) / name, State(model), ignore_keys=list(EXTRAS) if "single" in folder else None
        )
        check(model, oracle(folder))


def test_every_dtype_of_the_real_file(tmp_path: Path) -> None:
    saved = torch.load(checkpoint("safetensors-single").parent / "oracle.pt", weights_only=True)
    model = torch.nn.Module()
    for name, value in saved.items():
        if name.startswith("extra/"):
            model.register_buffer(name.replace("/", "_"), torch.zeros_like(value))
    rename = {
        name.removeprefix("state/model/"): f"extra_{name.removeprefix('state/model/')}" for name in EXTRAS
    }
    result = load(
        checkpoint("safetensors-single"), State(model), strict_model_weights=False, options={"rename": rename}
    )
    assert result.receipt.missing == ()
    found = model.state_dict()
    assert len(found) == len(EXTRAS)
    for name, value in found.items():
        wanted = saved[name.replace("extra_", "extra/")]
        assert value.dtype == wanted.dtype
        assert torch.equal(value.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8)), name


def test_what_else_the_files_say_is_returned() -> None:
    ignored = list(EXTRAS)
    single = load(checkpoint("safetensors-single"), State(Awkward()), ignore_keys=ignored)
    assert single.extra == {"metadata": {"format": "pt"}}
    assert load(checkpoint("safetensors-sharded-index"), State(Awkward())).extra == {
        "metadata": {"total_size": 9870}
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_job_with_an_optimizer_is_told_that_there_are_weights_alone(folder: str) -> None:
    model = Awkward()
    before = model.odd.detach().clone()
    state = State(model, torch.optim.AdamW(model.parameters()))
    ignored = list(EXTRAS) if "single" in folder else None
    with pytest.raises(
        MismatchError,
        match=r"optimizers/AdamW: .*\nPass load_weights_only=True, as the checkpoint has weights alone, ",
    ):
        load(checkpoint(folder), state, ignore_keys=ignored)
    assert torch.equal(model.odd, before)
    load(checkpoint(folder), state, load_weights_only=True, ignore_keys=ignored)
    check(model, oracle(folder))


def test_a_manifest_covers_what_has_no_checksum(tmp_path: Path) -> None:
    folder = checkpoint("safetensors-sharded-index")
    served = {f"/m/{path.name}": Served(path.read_bytes()) for path in folder.iterdir()}
    lines = [f"{hashlib.sha256(one.body).hexdigest()}  {path[3:]}\n" for path, one in served.items()]
    served["/m/SHA256SUMS"] = Served("".join(lines).encode())
    with counting_server(served) as server:
        receipt = load(server.url("/m"), State(Awkward()), options={"cache_dir": str(tmp_path)}).receipt
        assert [file.verified_by for file in receipt.files] == [("sha256 of SHA256SUMS",)] * 3
        assert receipt.unverified == ()
        served[f"/m/{FILES[0]}"] = Served(served[f"/m/{FILES[0]}"].body[:-1] + b"x")
        with pytest.raises(CorruptError, match=rf"{FILES[0]}: .*sha256 of SHA256SUMS: expected"):
            load(server.url("/m"), State(Awkward()), options={"cache_dir": str(tmp_path)})


@pytest.mark.parametrize("kept", ["wte.weight", "head.weight"])
def test_a_tied_weight_under_either_of_its_names(tmp_path: Path, kept: str) -> None:
    wanted = oracle("safetensors-sharded-index")
    saved = {kept if name == "wte.weight" else name: value for name, value in wanted.items()}
    (tmp_path / "model.safetensors").write_bytes(as_safetensors(saved))
    model = Awkward()
    receipt = load(tmp_path, State(model)).receipt
    check(model, wanted)
    assert (receipt.missing, receipt.unexpected) == ((), ())
    del saved[kept]
    (tmp_path / "model.safetensors").write_bytes(as_safetensors(saved))
    with pytest.raises(MismatchError, match=r"model/wte\.weight"):
        load(tmp_path, State(Awkward()))


class Bucket:
    """A store of the user's own, whose objects lie in no folder."""

    def __init__(self, objects: Mapping[str, bytes]) -> None:
        self.objects = objects

    def download_object(self, object_name: str, filename: str, **_: Any) -> None:
        if object_name not in self.objects:
            raise FileNotFoundError(object_name)
        Path(filename).write_bytes(self.objects[object_name])


def test_a_store_without_ranges_and_folders(tmp_path: Path) -> None:
    folder = checkpoint("safetensors-sharded-index")
    objects = {path.name: path.read_bytes() for path in folder.iterdir()}
    for prefix, path in (("", INDEX), ("a/b/", f"a/b/{INDEX}"), ("a/b/", "a/b")):
        model = Awkward()
        bucket = Bucket({f"{prefix}{name}": data for name, data in objects.items()})
        load(
            path, State(model), object_store=bucket, options={"cache_dir": str(tmp_path)}, progress_bar=False
        )
        check(model, oracle("safetensors-sharded-index"))


def test_a_server_that_answers_a_page_to_every_name_has_no_model(tmp_path: Path) -> None:
    with counting_server() as server:
        server.missing = Served(b"<!doctype html><html></html>", content_type="text/html")
        with pytest.raises(RankloadError, match=r"is no checkpoint|HTML page"):
            load(server.url("/m"), State(Awkward()), options={"cache_dir": str(tmp_path)})
        asked = len(server.requests)
        name = "shard-00001-model-00001-of-00001.safetensors"
        server.served[f"/m/{name}"] = Served((checkpoint("dcp-hf-sharded-w2") / name).read_bytes())
        with pytest.raises(CorruptError, match="HTML page"):
            load(server.url(f"/m/{name}"), State(Awkward()), options={"cache_dir": str(tmp_path)})
        assert len(server.requests) < 2 * asked + 40


# --- several files and their index -----------------------------------------------------------------------------------


def parts() -> dict[str, dict[str, torch.Tensor]]:
    return {FILES[0]: {"weight": torch.ones(2, 2)}, FILES[1]: {"bias": torch.full((2,), 3.0)}}


def restored(folder: Path, **options: Any) -> Any:
    return load(folder, State(torch.nn.Linear(2, 2)), **options)


def change_index(path: Path, **changes: Any) -> None:
    told = json.loads(path.read_text())
    told["weight_map"].update(changes)
    path.write_text(json.dumps(told))


def test_torch_files_with_an_index(tmp_path: Path) -> None:
    names = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / names[0])
    torch.save({"bias": torch.full((2,), 3.0)}, tmp_path / names[1])
    path = tmp_path / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"weight": names[0], "bias": names[1]}}))
    module = torch.nn.Linear(2, 2)
    receipt = load(tmp_path, State(module)).receipt
    assert (receipt.kind, receipt.layout) == ("sharded", "state dict")
    assert torch.equal(module.bias, torch.full((2,), 3.0))
    assert [Path(name).name for name in receipt.unverified] == [path.name]
    torch.save({"model": {"bias": torch.ones(2)}, "optimizer": {}}, tmp_path / names[1])
    with pytest.raises(FormatError, match=f"{names[1]} is no state dict.*hand-written"):
        restored(tmp_path)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    save_in_files(tmp_path, parts())
    (tmp_path / FILES[1]).unlink()
    with pytest.raises(NotFoundError, match=rf"{FILES[1]}: not there, needed by rank 0"):
        restored(tmp_path)


def test_a_weight_that_its_file_lacks_is_named(tmp_path: Path) -> None:
    path = save_in_files(tmp_path, parts())
    change_index(path, gain=FILES[0])
    with pytest.raises(CorruptError, match=rf"not there: 'gain' in {FILES[0]}\."):
        restored(tmp_path)
    save_in_files(tmp_path, parts())
    change_index(path, bias=FILES[0])
    (tmp_path / "more.safetensors").write_bytes(as_safetensors({"more": torch.ones(1)}))
    change_index(path, bias=FILES[0], gain=FILES[1])
    with pytest.raises(CorruptError, match=rf"'bias' in {FILES[0]} \(it is in {FILES[1]}\), 'gain' in"):
        restored(tmp_path)


def test_a_weight_in_two_files_is_named(tmp_path: Path) -> None:
    two = parts()
    save_in_files(tmp_path, two)
    two[FILES[1]]["weight"] = torch.zeros(2, 2)
    (tmp_path / FILES[1]).write_bytes(as_safetensors(two[FILES[1]]))
    with pytest.raises(CorruptError, match=f"{FILES[0]} and {FILES[1]} both have 'weight'"):
        restored(tmp_path)


def test_a_weight_that_the_index_does_not_name_is_taken_and_told(tmp_path: Path) -> None:
    two = parts()
    path = save_in_files(tmp_path, two)
    told = json.loads(path.read_text())
    del told["weight_map"]["bias"]
    two[FILES[0]]["bias"] = two[FILES[1]].pop("bias")
    two[FILES[1]]["more"] = torch.ones(1)
    told["weight_map"]["more"] = FILES[1]
    for name, tensors in two.items():
        (tmp_path / name).write_bytes(as_safetensors(tensors))
    path.write_text(json.dumps(told))
    with pytest.raises(MismatchError, match=r"unexpected in the checkpoint.*\n.*model/more"):
        restored(tmp_path)
    result = restored(tmp_path, ignore_keys=["state/model/more"])
    assert result.receipt.notes == (f"{path} does not name these weights of its files: 'bias'",)


@pytest.mark.parametrize(
    "name",
    ["../elsewhere.safetensors", "/etc/passwd", "a/../../b", "a\\b", ".", "a//b", "./a", "a\nb", "~/\0"],
)
def test_an_index_names_files_of_its_own_folder_and_no_others(tmp_path: Path, name: str) -> None:
    path = save_in_files(tmp_path, parts())
    change_index(path, bias=name)
    with pytest.raises(UnsafeError, match="expected one in the folder of the index"):
        restored(tmp_path)


def test_an_index_names_no_more_files_than_a_model_has(tmp_path: Path) -> None:
    weight_map = {f"w{number}": f"{number}.safetensors" for number in range(10_001)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UnsafeError, match="names 10,001 files, expected at most 10,000"):
        restored(tmp_path)


def test_files_in_a_folder_below(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    save_in_files(tmp_path, {f"parts/{name}": tensors for name, tensors in parts().items()})
    assert restored(tmp_path).receipt.unverified


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[]", "the files of weights in weight_map"),
        ("{}", "the files of weights in weight_map"),
        ('{"weight_map": {}}', "the files of weights in weight_map"),
        ('{"weight_map": ["a"]}', "the files of weights in weight_map"),
        ('{"weight_map": {"a": 3}}', "weight_map has '3' for 'a'"),
        ('{"weight_map": {"a": ""}}', "weight_map has '' for 'a'"),
        ('{"weight_map": {"a": "b", "a": "c"}}', "'a' occurs twice"),
        ("<html>", "the index is no JSON"),
        ("", "the index is no JSON"),
    ],
)
def test_an_index_that_is_none(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CorruptError, match=f"{INDEX}: .*{part}"):
        restored(tmp_path)


def test_an_adapter_over_its_base(tmp_path: Path) -> None:
    """A LoRA adapter is one more file of weights; its folder says to pass it."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2).requires_grad_(False), torch.nn.Linear(2, 2))
    (tmp_path / "base.safetensors").write_bytes(as_safetensors(model.state_dict()))
    (tmp_path / "adapter_config.json").write_text("{}")
    adapter = {"1.weight": torch.ones(2, 2), "1.bias": torch.ones(2)}
    (tmp_path / "adapter_model.safetensors").write_bytes(as_safetensors(adapter))
    with pytest.raises(FormatError, match=r"pass its file adapter_model\.safetensors"):
        load(tmp_path, State(model))
    load(tmp_path / "base.safetensors", State(model), load_weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path / "adapter_model.safetensors", State(model), load_weights_only=True,
             options={"allow_missing_frozen": True})  # fmt: skip
    assert torch.equal(model[1].weight, torch.ones(2, 2))
