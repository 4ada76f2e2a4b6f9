from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rankload.loader import State, load
from rankload.loader.errors import CorruptError, FormatError
from rankload.loader.saved.contents import Saved
from rankload.loader.saved.tensor import SavedTensor, StorageRef
from rankload.loader.saved.values import InertArray, InertObject, InertTensor
from rankload.loader.sources.single_file import read_layout


def tensor() -> SavedTensor:
    return SavedTensor.in_storage(StorageRef("f", "0", 0, 8, None), "float32", (2,), (1,))


def optimizer_states() -> dict[str, Any]:
    return {"state": {}, "param_groups": []}


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


ARRAY = InertArray("<f4", (1,), b"\0\0\0\0")
MODULE = InertObject("my.Net", state={"_modules": {}, "_parameters": {}})
DTENSOR = InertTensor("torch.distributed.tensor.DTensor", kind="DTensor, one rank's shard of a tensor")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": {"w": DTENSOR}}, "'model' is a dict without tensors: .*DTensor.*full_state_dict=True"),
        ({"w": DTENSOR, "b": DTENSOR}, "2 of type torch.distributed.tensor.DTensor. .*one rank's shard"),
        (
            {"state_dict": {"w": ARRAY}},
            r"'state_dict' is .* 1 of type NumPy array\. Save tensors: .*from_numpy",
        ),
        (
            {"net": MODULE, "epoch": 3},
            r"'net' is a whole module, a pickled my\.Net\..* save its state_dict\(\)",
        ),
        ({"model": {}}, "'model' is an empty dict"),
        (
            {"model": {"w": 1.0}, "epoch": 3},
            r"\('model' is a dict without tensors: its values are 1 of type float\)",
        ),
        (
            {"state": {0: {}}, "param_groups": []},
            "f is an optimizer's state_dict alone.* Pass the file that has",
        ),
        ({"last_epoch": 3, "base_lrs": [0.1]}, "f is a learning-rate scheduler's state_dict alone"),
        (
            {"scale": 1.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 3},
            "f is a gradient scaler's state_dict alone",
        ),
        ({"python": 1, "numpy": 2, "cpu": tensor()}, "f is a rank's random states alone"),
        (
            {"optimizer_state_dict": {"zero_stage": 1, "partition_count": 2}, "ds_version": "0.19"},
            "f is one rank's optimizer file of a DeepSpeed checkpoint.* pass the folder",
        ),
        (
            {"w": tensor(), "epoch": 3},
            r"1 tensor at its top level, .*'epoch' \(int\).*\"model\": \"/\"",
        ),
        (
            {"w": tensor(), "v": DTENSOR, "epoch": 3},
            r"'v' \(torch\.distributed\.tensor\.DTensor\), 'epoch' .*full_state_dict=True",
        ),
        ([tensor(), 3], "holds a list without names: 1 of type tensor, 1 of type int, expected a dict"),
        (tensor(), "f holds a tensor, expected a dict"),
        (ARRAY, "f holds a NumPy array, expected a dict"),
    ],
)
def test_the_real_obstacle_is_named(tree: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_layout(tree, file="f")


@pytest.mark.parametrize(
    ("tree", "layout"),
    [
        ({"trainer": {"weights": {"w": tensor()}}, "n": 1}, {"model": "trainer/weights"}),
        ({"model": {"a": {"w": tensor()}, "b": {"v": tensor()}}}, {"model": "model/a"}),
        ({"a": {"w": tensor()}, "opt": optimizer_states()}, {"model": "a", "optimizer": "opt"}),
        ({"w": tensor(), "epoch": 3}, {"model": "/"}),
    ],
)
def test_the_layout_that_is_advised_works(tree: Any, layout: dict[str, str]) -> None:
    with pytest.raises(FormatError) as raised:
        read_layout(tree, file="f")
    advised = re.search(r"LoadOptions\(layout=(\{.*?\})\)", str(raised.value))
    assert advised is not None
    assert json.loads(advised[1]) == layout
    found = read_layout(tree, file="f", layout=layout, optimizer_classes=["SGD"])
    assert found.state["model"]
    assert ("optimizers" in found.state) == ("optimizer" in layout)


def test_a_stage_3_model_file_is_no_checkpoint_and_one_of_a_lower_stage_is_told(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    one = {"module": {"w": torch.zeros(2), "b": torch.zeros(1)}, "buffer_names": ["b"], "ds_version": "0.19"}
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save(one, path)
    model = torch.nn.ParameterDict({"w": torch.ones(2)})
    model.register_buffer("b", torch.ones(1))
    with pytest.warns(UserWarning, match="one file of a DeepSpeed checkpoint and has the weights alone"):
        load(path, State(model), progress_bar=False)
    assert torch.equal(model["w"], torch.zeros(2))
    one["module"]["w"] = torch.zeros(0)
    torch.save(one, path)
    with pytest.raises(
        FormatError, match=r"model file of a DeepSpeed checkpoint of stage 3.* pass the folder"
    ):
        load(path, State(model), progress_bar=False)


def optimizer_state() -> dict[str, Any]:
    return {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1}]}


def test_a_bare_state_dict_may_have_extra_state() -> None:
    saved = {"w": tensor(), "head._extra_state": {"scale": 2}, "_extra_state": None}
    found = read_layout(saved, file="f")
    assert found.layout == "state dict"
    assert set(found.state["model"]) == set(saved)
    with pytest.raises(FormatError, match="its layout is not known"):
        read_layout({**saved, "epoch": 3}, file="f")
    with pytest.raises(FormatError, match="its layout is not known"):
        read_layout({"_extra_state": 1}, file="f")


@pytest.mark.parametrize("root", ["", "/"])
def test_layout_maps_the_root_itself(root: str) -> None:
    saved = {"w": tensor(), "_extra_state": 1, "epoch": 3, "opt": optimizer_state()}
    found = read_layout(
        saved, file="f", layout={"model": root, "optimizer": "opt"}, optimizer_classes=["SGD"]
    )
    assert set(found.state["model"]) == {"w", "_extra_state"}
    assert found.state["optimizers"] == {"SGD": saved["opt"]}
    assert found.extra == {"epoch": 3}
    with pytest.raises(FormatError, match=r"maps model to .*expected a dict of names and tensors"):
        read_layout({"epoch": 3}, file="f", layout={"model": root})


def test_layout_refuses_what_a_role_cannot_be() -> None:
    saved = {"model": {"w": tensor()}, "optimizer": "sgd", "scaler": [{}]}
    for role, kind in (("optimizer", "str"), ("scheduler", "str"), ("model", "str"), ("scaler", "list")):
        layout = {role: "scaler" if role == "scaler" else "optimizer"}
        with pytest.raises(FormatError, match=f"maps {role} to '.*', where there is a {kind}; expected"):
            read_layout(saved, file="f", layout=layout)


def test_keys_that_are_not_what_they_seem_give_way_to_the_next() -> None:
    saved = {
        "model": "resnet",
        "optimizer": "sgd",
        "scheduler": None,
        "scaler": 1.0,
        "model_state_dict": {"w": tensor()},
        "optimizer_state_dict": optimizer_state(),
        "lr_scheduler": {"last_epoch": 1},
    }
    found = read_layout(saved, file="f", optimizer_classes=["SGD"], scheduler_classes=["StepLR"])
    assert list(found.state["model"]) == ["w"]
    assert found.state["optimizers"] == {"SGD": saved["optimizer_state_dict"]}
    assert found.state["schedulers"] == {"StepLR": {"last_epoch": 1}}
    assert "scaler" not in found.state
    assert found.extra == {"model": "resnet", "optimizer": "sgd", "scheduler": None, "scaler": 1.0}


def test_settings_of_an_optimizer_give_way_to_its_state() -> None:
    saved = {"model": {"w": tensor()}, "optimizer": {"lr": 0.1}, "optimizer_state": optimizer_state()}
    found = read_layout(saved, file="f", optimizer_classes=["SGD"])
    assert found.state["optimizers"] == {"SGD": saved["optimizer_state"]}
    assert found.extra == {"optimizer": {"lr": 0.1}}


@pytest.mark.parametrize("value", [None, 3, [], [None], {"SGD": None}, [{"SGD": None}]])
def test_an_optimizer_that_is_nothing_is_handed_on(value: Any) -> None:
    found = read_layout({"model": {"w": tensor()}, "optimizers": value}, file="f", optimizer_classes=["SGD"])
    assert "optimizers" not in found.state
    assert found.extra == {"optimizers": value}


def test_optimizers_by_class_stay_under_their_names() -> None:
    saved = {"model": {"w": tensor()}, "optimizers": {"Adam": optimizer_state(), "SGD": optimizer_state()}}
    found = read_layout(saved, file="f", optimizer_classes=["SGD"])
    assert found.state["optimizers"] == saved["optimizers"]


def test_a_state_of_ones_own_is_not_composers() -> None:
    saved = {"state": {"epoch": 3}, "rng": [{"python": 1}], "model": {"w": tensor()}, "rank_zero_seed": 17}
    found = read_layout(saved, file="f")
    assert found.layout == "hand-written"
    assert found.rng == [{"python": 1}]
    assert found.extra["state"] == {"epoch": 3}
    again = found.with_tree(found.as_tree())
    assert (again.state, again.rng, again.extra) == (found.state, found.rng, found.extra)
    assert again.whole is found
    assert again.rank_zero_seed == 17
    with pytest.raises(FormatError, match="'state', 'rng'"):
        read_layout({"state": {"epoch": 3}, "rng": []}, file="f")
    assert read_layout({"state": {"_timestamp": {}}, "rng": []}, file="f").layout == "composer"


def test_composers_lists_of_pairs_must_be_pairs() -> None:
    found = read_layout({"state": {"schedulers": [("StepLR", {})]}}, file="f")
    assert found.state["schedulers"] == {"StepLR": {}}
    with pytest.raises(CorruptError, match="state/schedulers is a list, expected pairs"):
        read_layout({"state": {"schedulers": [3]}}, file="f")


def test_random_states_of_another_form_are_not_taken_for_ours() -> None:
    found = read_layout({"model": {"w": tensor()}, "rng": [tensor(), tensor()]}, file="f")
    again = found.with_tree(found.as_tree())
    assert again.rng is None
    assert len(again.extra["rng"]) == 2


@pytest.mark.parametrize(
    ("state", "extra", "seed"),
    [
        ({"rank_zero_seed": 1}, {"rank_zero_seed": 2}, 1),
        ({}, {"rank_zero_seed": 2}, 2),
        ({"rank_zero_seed": "x"}, {"rank_zero_seed": True}, None),
        ({}, {}, None),
    ],
)
def test_the_seed_is_looked_for_in_both_places(state: Any, extra: Any, seed: int | None) -> None:
    assert Saved("f", "monolithic", "hand-written", state, None, extra).rank_zero_seed == seed
