from __future__ import annotations

from typing import Any

import pytest
from rankload.loader.errors import FormatError
from rankload.loader.monolithic import read_layout
from rankload.loader.values import InertObject, LazyTensor, StorageRef


def tensor() -> LazyTensor:
    return LazyTensor(StorageRef("f", "0", 0, 8, None), "float32", (2,), (1,))


def test_composer() -> None:
    found = read_layout(
        {"state": {"model": {"w": tensor()}, "schedulers": {"StepLR": {}}}, "rng": [{"python": 1}], "x": 1},
        file="f",
    )
    assert found.layout == "composer"
    assert set(found.state) == {"model", "schedulers"}
    assert found.rng == [{"python": 1}]
    assert found.extra == {"x": 1}
    assert found.as_tree() == {"state": found.state, "rng": found.rng, "x": 1}


def test_composer_weights_only_has_no_rng() -> None:
    assert read_layout({"state": {"model": {"w": tensor()}}}, file="f").rng is None


def test_lightning() -> None:
    saved: dict[str, Any] = {
        "state_dict": {"w": tensor()},
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "lr_schedulers": [{"last_epoch": 1}],
        "callbacks": {"ModelCheckpoint{'monitor': None}": {}},
        "pytorch-lightning_version": "2.5",
        "epoch": 3,
    }
    found = read_layout(saved, file="f", optimizer_classes=["AdamW"], scheduler_classes=["StepLR"])
    assert found.layout == "lightning"
    assert list(found.state["optimizers"]) == ["AdamW"]
    assert list(found.state["schedulers"]) == ["StepLR"]
    assert found.extra == {"pytorch-lightning_version": "2.5", "epoch": 3}


def test_bare_state_dict() -> None:
    found = read_layout({"w": tensor(), "b": tensor()}, file="f")
    assert found.layout == "state dict"
    assert list(found.state["model"]) == ["w", "b"]


@pytest.mark.parametrize("model", ["model", "model_state_dict", "state_dict", "net"])
@pytest.mark.parametrize("optimizer", ["optimizer", "optimizer_state_dict"])
def test_hand_written(model: str, optimizer: str) -> None:
    saved = {model: {"w": tensor()}, optimizer: {"state": {}, "param_groups": []}, "epoch": 4, "loss": 0.5}
    found = read_layout(saved, file="f", optimizer_classes=["SGD"])
    assert found.layout == "hand-written"
    assert list(found.state["model"]) == ["w"]
    assert list(found.state["optimizers"]) == ["SGD"]
    assert found.extra == {"epoch": 4, "loss": 0.5}


def test_hand_written_rng_that_is_not_ours_is_handed_on() -> None:
    found = read_layout({"model": {"w": tensor()}, "rng": {"torch": tensor()}}, file="f")
    assert found.rng is not None
    found = read_layout({"model": {"w": tensor()}, "rng": tensor()}, file="f")
    assert found.rng is None
    assert "rng" in found.extra


def test_layout_option_maps_nested_keys() -> None:
    saved = {"trainer": {"weights": {"w": tensor()}}, "opt": {"state": {}, "param_groups": []}, "n": 1}
    found = read_layout(
        saved,
        file="f",
        layout={"model": "trainer/weights", "optimizer": "opt"},
        optimizer_classes=["SGD"],
    )
    assert list(found.state["model"]) == ["w"]
    assert list(found.state["optimizers"]) == ["SGD"]
    assert "n" in found.extra
    with pytest.raises(FormatError, match="no 'wieghts'"):
        read_layout(saved, file="f", layout={"model": "trainer/wieghts"})


def test_unknown_layout_lists_its_keys_and_the_option() -> None:
    with pytest.raises(FormatError, match=r"f: .*'alpha', 'beta'.*LoadOptions\(layout="):
        read_layout({"alpha": 1, "beta": {"w": 2}}, file="f")


def test_a_whole_pickled_model_is_refused_by_name() -> None:
    with pytest.raises(FormatError, match=r"one pickled my.Net.*state_dict\(\)"):
        read_layout(InertObject("my.Net"), file="f")
