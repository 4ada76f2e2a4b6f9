"""Checkpoints on the Hugging Face Hub: its client against as much of its API as it asks for."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_server import Behaviour, bad_server
from hub_server import REVISION, Hub, hub_server
from rankload.loader import AccessError, CorruptError, NotFoundError, State, load
from safetensors_files import as_safetensors

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

PARTS, WHOLE, SMALL = "folder/model.pt", "folder/model.pt.gz", "small.pt"
REPO = "somebody/checkpoints"


@pytest.fixture(scope="module")
def module() -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(512, 512)


@pytest.fixture
def hub(module: torch.nn.Linear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 512)).sum().backward()
    optimizer.step()
    torch.save({"state": State(module, optimizer).state_dict()}, tmp_path / "saved.pt")
    data = (tmp_path / "saved.pt").read_bytes()
    torch.save({"model": module.state_dict()}, tmp_path / "small.pt")
    with hub_server(REPO, {PARTS: data, WHOLE: gzip.compress(data, 1), SMALL: data}) as running:
        yield running


def restored(hub: Hub, name: str, module: torch.nn.Linear, folder: Path, **options: Any) -> Any:
    target = torch.nn.Linear(512, 512)
    options = {"cache_dir": str(folder / "cache"), **options}
    options["storage_options"] = {
        "endpoint": hub.url,
        "token": hub.token or False,
        "skip_instance_cache": True,
    }
    result = load(
        f"hf://{REPO}/{name}", State(target), load_weights_only=True, progress_bar=False, options=options
    )
    assert torch.equal(target.weight, module.weight)
    return result.receipt.files[0]


def test_only_what_is_needed_comes(hub: Hub, module: torch.nn.Linear, tmp_path: Path) -> None:
    file = restored(hub, PARTS, module, tmp_path)
    assert file.verified_by == ("zip CRC-32",)
    assert file.fetched_bytes < file.size_bytes * 0.6
    ranges = [asked for method, path, asked in hub.asked if "/resolve/" in path and method == "GET"]
    assert ranges
    assert all(ranges)


def test_what_comes_whole_is_compared(hub: Hub, module: torch.nn.Linear, tmp_path: Path) -> None:
    assert restored(hub, WHOLE, module, tmp_path).verified_by == ("zip CRC-32", "sha256 of the store")
    hub.sha256[WHOLE] = "0" * 64
    got = hashlib.sha256(hub.files[WHOLE]).hexdigest()
    with pytest.raises(CorruptError, match=f"sha256 of the store: expected {'0' * 64}, got {got}"):
        restored(hub, WHOLE, module, tmp_path)


def test_what_is_not_there_and_who_is_not_let_in(hub: Hub, module: torch.nn.Linear, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no-such\.pt"):
        restored(hub, "no-such.pt", module, tmp_path)
    hub.token = "hf_right"
    restored(hub, PARTS, module, tmp_path)
    options = {"storage_options": {"endpoint": hub.url, "token": "hf_wrong", "skip_instance_cache": True}}
    with pytest.raises((AccessError, NotFoundError)) as caught:
        load(
            f"hf://{REPO}/{PARTS}", State(torch.nn.Linear(512, 512)), load_weights_only=True, options=options
        )
    assert "hf_wrong" not in str(caught.value)


def test_the_token_is_for_the_hub_alone(hub: Hub, module: torch.nn.Linear, tmp_path: Path) -> None:
    """The Hub's files lie on another server, to which it redirects."""
    hub.token = "hf_right"
    with bad_server({f"/{name}": Behaviour(data) for name, data in hub.files.items()}) as other:
        hub.elsewhere = other.url("")
        restored(hub, WHOLE, module, tmp_path)
        restored(hub, SMALL, module, tmp_path, verify="off")
        assert {one.path for one in other.asked} == {f"/{WHOLE}", f"/{SMALL}"}
        assert "hf_right" not in str(other.asked)


@pytest.mark.parametrize("revision", ["", "@main", f"@{REVISION}"])
@pytest.mark.parametrize("listed", [False, True])
def test_a_models_repository_by_its_name(
    hub: Hub, module: torch.nn.Linear, tmp_path: Path, revision: str, listed: bool
) -> None:
    state = {name: value.detach() for name, value in module.state_dict().items()}
    hub.files["config.json"] = b"{}"
    others = {"unwanted": torch.ones(512, 512)}
    if listed:
        one, two = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        hub.files |= {
            one: as_safetensors({"weight": state.pop("weight"), **others}),
            two: as_safetensors(state),
        }
        weight_map = {"weight": one, "unwanted": one, "bias": two}
        hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    else:
        hub.files["model.safetensors"] = as_safetensors({**others, **state})
    target = torch.nn.Linear(512, 512)
    storage = {"endpoint": hub.url, "token": False, "skip_instance_cache": True}
    receipt = load(
        f"hf://{REPO}{revision}",
        State(target),
        load_weights_only=True,
        ignore_keys=["state/model/unwanted"],
        progress_bar=False,
        options={"cache_dir": str(tmp_path / "cache"), "storage_options": storage},
    ).receipt
    assert torch.equal(target.weight, module.weight)
    assert torch.equal(target.bias, module.bias)
    assert (receipt.kind, receipt.layout) == ("sharded" if listed else "monolithic", "safetensors")
    weights = next(file for file in receipt.files if file.size_bytes > 1 << 20)
    assert weights.fetched_bytes < weights.size_bytes * 0.7
    # What came whole was compared with the store's own checksum; what came in parts has none.
    assert weights.verified_by == ()
    assert receipt.unverified == (weights.name,)
