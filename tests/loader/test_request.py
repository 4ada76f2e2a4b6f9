"""What a load was asked for: refused where it cannot be meant, compared between ranks."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rankload.loader.errors import OptionError
from rankload.loader.options import LoadOptions, Options, resolve_options
from rankload.loader.request import LoadRequest, as_path, check_arguments, check_same
from rankload.loader.state import State


class Model:
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Adam(Model): ...


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])


def constant_lr() -> Any:
    return torch.optim.lr_scheduler.ConstantLR(sgd())


class Foreign:
    """As Composer's State: loads itself, and has properties that may fail."""

    run_name = "mine"

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None: ...

    def load_model_state(self, *args: Any, **kwargs: Any) -> None: ...

    @property
    def model(self) -> Any:
        raise RuntimeError("not yet")


def request(**changes: Any) -> LoadRequest:
    plain = LoadRequest("ep1-rank{rank}.tar", State(Model()), resolve_options(None, {}))
    return replace(plain, **changes)


def test_paths() -> None:
    assert as_path("a/{rank}") == "a/{rank}"
    assert as_path(Path("a/b")) == "a/b"
    assert request(path=Path("a/b")).path == "a/b"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": None}, "path is None: expected a string or an os.PathLike"),
        ({"path": 3}, "path is 3: expected a string"),
        ({"path": b"a"}, "path is of type bytes: expected a string"),
        ({"path": ""}, "path is empty"),
        ({"state": "a.pt", "path": State(Model())}, r"the order is load\(path, state\)"),
        ({"state": torch.nn.Linear(1, 1)}, r"Composer's State\. Pass State\(model=\.\.\.\)"),
        ({"state": sgd()}, r"state is of type SGD: .* Pass State\(model=\.\.\., optimizers=\.\.\.\)"),
        ({"state": State(sgd())}, "state.model holds an object of type SGD, which is a kind of optimizer"),
        (
            {"state": State(constant_lr())},
            "state.model holds an object of type ConstantLR, which is a kind of lr",
        ),
        ({"state": State(Model(), torch.nn.Linear(1, 1))}, "state.optimizers holds .* Linear, .* of module"),
        (
            {"state": State(Model(), constant_lr())},
            "state.optimizers holds .* ConstantLR, .* of lr scheduler",
        ),
        ({"state": State(Model(), sgd(), sgd())}, "state.schedulers holds .* SGD, .* of optimizer"),
        ({"state": Model()}, "state is of type Model: expected a rankload.State"),
        (
            {"state": State(None), "weights_only": True},
            r"State\(model=None\) restores nothing: pass the model",
        ),
        (
            {"weights_only": True, "options": resolve_options(LoadOptions(leave_out=["model"]), {})},
            r"leave_out=\['model'\] restores nothing: drop one of them",
        ),
        ({"state": State({"w": 1})}, r"state.model is of type dict: expected State\(model=...\)"),
        ({"weights_only": "no"}, "load_weights_only is 'no': expected True or False"),
        ({"strict": None}, "strict_model_weights is None: expected True or False"),
        ({"progress_bar": {}}, "progress_bar is of type dict"),
        (
            {"object_store": "s3://me:pw@bucket"},
            "object_store is of type str: expected an fsspec file system",
        ),
        ({"object_store": {"key": "pw"}}, "object_store is of type dict"),
        ({"ignore_keys": 3}, "ignore_keys is 3: expected a list of globs"),
        ({"ignore_keys": ["a", 3]}, "ignore_keys holds 3: expected globs"),
        (
            {"exclude_algorithms": "BlurPool"},
            r"exclude_algorithms is 'BlurPool': pass a list, \['BlurPool'\]",
        ),
        ({"exclude_algorithms": [Model]}, "exclude_algorithms holds of type type: expected names"),
        (
            {"algorithm_passes": len},
            "algorithm_passes is of type builtin_function_or_method: expected a list",
        ),
        ({"algorithm_passes": ["x"]}, "algorithm_passes holds 'x': expected callables"),
        ({"logger": 3}, "logger=3: expected a logging.Logger"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        check_arguments(request(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"state": Foreign()},
        {"ignore_keys": "rng"},
        {"ignore_keys": ("rng", "state/*")},
        {"ignore_keys": lambda tree: None},
        {"exclude_algorithms": {"BlurPool"}, "algorithm_passes": (sorted,)},
        {"object_store": Model()},
    ],
)
def test_what_can_be_meant_passes(changes: dict[str, Any]) -> None:
    check_arguments(request(**changes))
    check_same([request(**changes).comparable()] * 2)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"path": "other"}, "path"),
        ({"ignore_keys": ["rng"]}, "ignore_keys"),
        ({"state": Foreign()}, "state.run_name"),
        ({"state": State(Model(), optimizers=Adam())}, "state.optimizers"),
        ({"state": State(Model(), schedulers=[Adam(), Adam()])}, "state.schedulers"),
        ({"state": State(Model(), scaler=Adam())}, "state.scaler"),
        ({"state": State(Model(), algorithms=Adam())}, "state.algorithms"),
        ({"options": resolve_options({"stall_timeout_s": 3}, {})}, "options.stall_timeout_s"),
        ({"options": resolve_options({"rename": {"a": "b"}}, {})}, "options.rename"),
    ],
)
def test_a_difference_between_ranks_is_named(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(OptionError, match=f"argument {name} differs between ranks.*rank 0: .*rank 1: "):
        check_same([request().comparable(), request(**changes).comparable()])


def test_all_options_are_compared_but_what_each_node_may_have_its_own_of() -> None:
    compared = {name.removeprefix("options.") for name in request().comparable() if "options." in name}
    own = {"cache_dir", "cache_home", "cache_size", "interface"}
    assert compared == {one.name for one in fields(Options)} - own
    others = resolve_options({"cache_dir": "/fast", "cache_home": "disk", "cache_size": 5}, {})
    check_same([request().comparable(), request(options=others).comparable()])


def test_the_kind_of_state_is_compared() -> None:
    ours, theirs = request(state=State(Model(), run_name="mine")), request(state=Foreign())
    with pytest.raises(OptionError, match=r"argument state differs.*loader.state.State; .*Foreign"):
        check_same([ours.comparable(), theirs.comparable()])


def test_a_deepspeed_engine_on_one_rank_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("deepspeed.runtime.engine")
    module.DeepSpeedEngine = Adam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.engine", module)
    with pytest.raises(
        OptionError, match=r"state\.model differs.*rank 0: a module; rank 1: a DeepSpeed engine"
    ):
        check_same([request().comparable(), request(state=State(Adam())).comparable()])


def test_secrets_are_compared_and_not_shown() -> None:
    url = "https://me:{}@host/ep1-rank{{rank}}.tar?sig={}"
    first = request(path=url.format("secret1", "x")).comparable()
    for other in (url.format("secret2", "x"), url.format("secret1", "secret3")):
        second = request(path=other).comparable()
        assert "secret" not in str(first) + str(second)
        with pytest.raises(OptionError, match=r"argument path's user info or query differs.*not shown"):
            check_same([first, second])
    with pytest.raises(OptionError, match=r"argument path differs.*https://host/ep1-rank\{rank\}.tar; "):
        check_same([first, request(path="https://me:secret1@other/").comparable()])


def test_options_are_the_same_whatever_their_addresses_and_order() -> None:
    def one(names: set[str]) -> LoadRequest:
        options = {"storage_options": {"session": object(), "retry": [1, {"n": 2}]}, "safe_types": names}
        return request(options=resolve_options(options, {}))

    check_same([one({"a.B", "c.D"}).comparable(), one({"c.D", "a.B"}).comparable()])
    other = request(options=resolve_options({"storage_options": {"retry": [3]}, "safe_types": {"a.B"}}, {}))
    with pytest.raises(OptionError, match=r"options\.storage_options differs.*digest"):
        check_same([one({"a.B"}).comparable(), other.comparable()])
