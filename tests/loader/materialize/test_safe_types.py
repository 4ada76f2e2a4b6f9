"""What is refused for its type: all of it at once, with advice that can work; and what stays inert instead."""

from __future__ import annotations

import datetime
import io
import os
import subprocess
import sys
import zoneinfo
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rankload.loader.errors import UnsafeError
from rankload.loader.formats.torch_file import read_index
from rankload.loader.materialize.objects import materialize
from rankload.loader.materialize.safe_types import can_be_allowed, require_safe
from rankload.loader.materialize.tensors import TensorReader
from rankload.loader.saved.values import GlobalName, InertArray, InertObject
from torch_files import read_whole, zip_with

from rankload import State, load


class Setting:
    """Stands for a class of the user's."""

    def __init__(self, value: Any) -> None:
        self.value = value

    class Inner:
        """Named by its qualified name, which older pickles take apart."""


class Node:
    def __init__(self) -> None:
        self.me = [self]
        self.weight = torch.ones(2)


class Called:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.reduced = (function, args)

    def __reduce__(self) -> Any:
        return self.reduced


def tree_of(value: Any, path: Path, **options: Any) -> Any:
    torch.save(value, path, **options)
    return read_index(path).tree


def refusal(value: Any, path: Path, **options: Any) -> str:
    with pytest.raises(UnsafeError) as caught:
        require_safe({"state/x": tree_of(value, path, **options)}, file="f.pt")
    return str(caught.value)


def test_all_types_are_listed_at_once(tmp_path: Path) -> None:
    value = {"a": [Setting(1), Setting(2)], "b": Node(), "c[0]": Setting.Inner()}
    message = refusal(value, tmp_path / "f.pt")
    names = [f"{__name__}.{name}" for name in ("Setting", "Node", "Setting.Inner")]
    assert f"safe_types={names!r}" in message
    for line in ("state/x/a/0", "and 1 more", "state/x/b", "3 types", "f.pt"):
        assert line in message
    assert "ignore_keys=['state/x/a/0', 'state/x/a/1', 'state/x/b', 'state/x/c[[]0]']" in message
    got = read_whole(tmp_path / "f.pt", safe_types=names)
    assert (got["a"][1].value, type(got["c[0]"])) == (2, Setting.Inner)


@pytest.mark.parametrize(
    "value",
    [
        Called(os.system, "true"),
        Called(getattr, Setting(1), "value"),
        subprocess.Popen,
        os.system,
        io.TextIOWrapper,
        Called(zoneinfo.ZoneInfo._unpickle, "UTC", True),
    ],
)
def test_what_is_no_class_of_values_is_not_offered(tmp_path: Path, value: Any) -> None:
    message = refusal({"a": value}, tmp_path / "f.pt")
    offered = message.partition("LoadOptions(safe_types=")[2].partition(")")[0]
    assert offered in ("", f"['{__name__}.Setting']")
    assert "safe_types cannot help for" in message
    assert "ignore_keys=['state/x/a']" in message


def test_a_class_that_cannot_be_imported_is_not_offered(tmp_path: Path) -> None:
    for name in (b"no_such_package_here.models\nNet", b"rankload\nNo Name", b"os.path\nNothing"):
        path = zip_with(b"\x80\x02}X\x01\x00\x00\x00ac" + name + b"\n)Rs.", tmp_path / "f.pt")
        with pytest.raises(UnsafeError) as caught:
            require_safe({"": read_index(path).tree})
        assert "LoadOptions(safe_types=" not in str(caught.value)
    assert "no_such_package_here" not in sys.modules


def test_what_nobody_restores_stays_inert(tmp_path: Path) -> None:
    value = {
        "node": Node(),
        "kind": Setting,
        "array": np.array([print], dtype=object),
        "when": datetime.datetime(2024, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")),
        "holds": Setting(Node()),
        "epoch": 3,
    }
    tree = tree_of(value, tmp_path / "f.pt")
    got = materialize(tree, reader=TensorReader(), keep_unknown=True)
    node = got["node"]
    assert (type(node), node.global_name) == (InertObject, f"{__name__}.Node")
    assert node.state["me"][0] is node
    assert node.state["weight"].tolist() == [1.0, 1.0]
    assert isinstance(got["kind"], GlobalName)
    assert isinstance(got["array"], InertArray)
    assert got["when"].global_name == "datetime.datetime"
    assert got["epoch"] == 3
    # An allowed type is made, but not around what is not allowed.
    some = materialize(tree, reader=TensorReader(), keep_unknown=True, safe_types=[Setting])
    assert some["kind"] is Setting
    assert isinstance(some["holds"], InertObject)
    both = materialize(tree, reader=TensorReader(), keep_unknown=True, safe_types=[Setting, Node])
    assert both["holds"].value.me[0] is both["holds"].value


def test_very_many_places_are_left_out_by_one_glob(tmp_path: Path) -> None:
    value = {"state": {index: {"kept": Setting(1)} for index in range(30)}}
    assert "ignore_keys=['state/x/state/*']" in refusal(value, tmp_path / "f.pt")


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        (f"{__name__}.Setting.Inner", True),
        (f"{__name__}.refusal", False),
        ("torch.float6", False),
        ("torch.nn.Module", True),
        ("rankload.gone.Type", False),
        ("tabnanny.Not", False),
        ("this_is.no_module.Type", False),
        ("pip.not_imported.Type", True),
        ("pip.not_imported.rebuild", False),
        ("builtins.getattr", False),
        ("datetime.datetime", True),
        ("Type", False),
    ],
)
def test_what_safe_types_can_name(monkeypatch: pytest.MonkeyPatch, name: str, offered: bool) -> None:
    monkeypatch.delitem(sys.modules, "pip", raising=False)
    before = set(sys.modules)
    assert can_be_allowed(name) is offered
    assert set(sys.modules) == before


@pytest.mark.parametrize("function", ["_annealing_cos", "_annealing_linear"])
def test_a_function_that_is_bound_to_its_scheduler_is_left_out(tmp_path: Path, function: str) -> None:
    """So torch 1 saved it: with the whole scheduler, which holds the function too."""
    scheduler: Any = object.__new__(torch.optim.lr_scheduler.OneCycleLR)
    bound = Called(getattr, scheduler, function)
    vars(scheduler).update(optimizer=Setting(scheduler), anneal_func=bound)
    torch.save({"s": {"last_epoch": 3, "anneal_func": bound}}, tmp_path / "f.pt")
    assert read_whole(tmp_path / "f.pt")["s"] == {"last_epoch": 3}


@pytest.mark.parametrize("protocol", [2, 4])
def test_one_cycle_of_older_torch_leaves_its_function_out(tmp_path: Path, protocol: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))

    def schedule() -> torch.optim.lr_scheduler.OneCycleLR:
        optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)

    saved = schedule()
    saved.optimizer.step()
    saved.step()
    state = {**saved.state_dict(), "anneal_func": torch.optim.lr_scheduler.OneCycleLR._annealing_cos}
    del state["_anneal_func_type"]
    model = torch.nn.Module()
    model.w = parameter
    contents = {"model": model.state_dict(), "scheduler": state}
    torch.save(contents, tmp_path / "f.pt", pickle_protocol=protocol)
    mine = schedule()
    load(tmp_path / "f.pt", State(model, schedulers=[mine]), progress_bar=False)
    assert "anneal_func" not in vars(mine)
    for each in (saved, mine):
        each.optimizer.step()
        each.step()
    assert mine.get_last_lr() == saved.get_last_lr()
