"""docs/errors.md shows what the commonest mistakes are really answered with: all are made again, and compared."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from mistakes import (
    BEGIN,
    END,
    MISTAKES,
    PAGE,
    SGD,
    AdamW,
    CosineAnnealingLR,
    Net,
    StepLR,
    empty_folder,
    save,
    section,
    trained,
    two_groups,
)

from rankload import LoadOptions, State, load

PAGES = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip("\n").split("\n### ")
SHOWN = {f"### {text.removeprefix('### ')}".partition("\n")[0]: text for text in PAGES}


def plain(text: str) -> str:
    """`text` without numbers that other versions of torch would change: sizes and checksums."""
    return re.sub(r"CRC-32 \w{8}|says \w{8}|[\d,]{3,} bytes", "N", text).strip()


def test_there_are_forty_or_more_and_each_has_a_place_on_the_page() -> None:
    assert len(MISTAKES) >= 40
    assert list(SHOWN) == [f"### {one.heading}" for one in MISTAKES]
    assert all(one.remedy for one in MISTAKES)


@pytest.mark.parametrize("index", range(len(MISTAKES)), ids=[one.heading for one in MISTAKES])
def test_the_page_shows_what_the_mistake_is_answered_with(index: int) -> None:
    shown = SHOWN[f"### {MISTAKES[index].heading}"]
    made = section(index)
    assert plain(made.removeprefix("### ")) == plain(shown.removeprefix("### ")), "run make docs-errors"


def with_optimizer(model: Net, make: Callable[..., Any] = AdamW) -> State:
    return State(model, make(model.parameters(), lr=0.1))


def with_scheduler(model: Net) -> State:
    optimizer = AdamW(model.parameters(), lr=0.1)
    return State(model, optimizer, StepLR(optimizer, 3))


WEIGHTS = {f"net.{name}": tensor for name, tensor in Net().state_dict().items()}
REMEDIES: dict[str, tuple[dict[str, Any], State, dict[str, Any]]] = {
    "other sizes": (
        {},
        with_optimizer(Net(classes=5)),
        {"ignore_keys": ["state/model/head.weight", "state/model/head.bias"], "load_weights_only": True},
    ),
    "a prefix": (
        {"model": WEIGHTS, "optimizer": None},
        State(Net()),
        {"options": LoadOptions(rename={"net.": ""})},
    ),
    "keys of one's own": (
        {"model": None, "optimizer": None, "trainer": {"best": {"weights": Net().state_dict()}}},
        State(Net()),
        {"options": LoadOptions(layout={"model": "trainer/best/weights"})},
    ),
    "no optimizer": ({"optimizer": None}, with_optimizer(Net()), {"strict_model_weights": False}),
    "another optimizer, ignored": (
        {},
        with_optimizer(Net(), SGD),
        {"ignore_keys": ["state/optimizers/SGD"]},
    ),
    "another optimizer, weights only": ({}, with_optimizer(Net(), SGD), {"load_weights_only": True}),
    "other groups, weights only": ({}, State(model := Net(), two_groups(model)), {"load_weights_only": True}),
    "another scheduler": (
        {"scheduler": CosineAnnealingLR(trained()[1], 10).state_dict()},
        with_scheduler(Net()),
        {"ignore_keys": ["state/schedulers/StepLR"]},
    ),
}


@pytest.mark.parametrize("name", REMEDIES)
def test_what_the_messages_advise_works(name: str) -> None:
    changes, state, arguments = REMEDIES[name]
    with empty_folder(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(save(**changes), state, **arguments)
