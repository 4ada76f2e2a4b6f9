"""Parts that an adapter leaves out are added to those that the user's options leave out, in each form they come in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from rankload.integrations.parts import leave_out
from rankload.loader.options import resolve_options

from rankload import LoadOptions, OptionError

Given = LoadOptions | Mapping[str, Any] | None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (None, ("scheduler",)),
        ({}, ("scheduler",)),
        (LoadOptions(), ("scheduler",)),
        (LoadOptions(leave_out="optimizer"), ("optimizer", "scheduler")),
        ({"leave_out": "optimizer"}, ("optimizer", "scheduler")),
        (LoadOptions(leave_out={"rng", "scheduler"}), ("scheduler", "rng")),
        ({"leave_out": ["scaler"]}, ("scheduler", "scaler")),
    ],
)
def test_parts_are_added(options: Given, expected: tuple[str, ...]) -> None:
    found = resolve_options(leave_out(options, ["scheduler"]), {})
    assert found == resolve_options(LoadOptions(leave_out=expected), {})


def test_other_options_stay() -> None:
    for options in (LoadOptions(verify="off", leave_out=("rng",)), {"verify": "off", "leave_out": ("rng",)}):
        assert resolve_options(leave_out(options, []), {}) == resolve_options(options, {})


@pytest.mark.parametrize("options", [{"verfiy": "off"}, {"leave_out": 5}, {"leave_out": ["optimiser"]}, 7])
def test_what_means_nothing_is_refused_by_the_load(options: Any) -> None:
    with pytest.raises(OptionError):
        resolve_options(leave_out(options, ["scheduler"]), {})
