"""The block without Python's collector of reference cycles."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from rankload.loader import RankloadError, State, load
from rankload.loader.collector import collect_young, without_collector


def test_it_is_off_inside_and_as_before_afterwards() -> None:
    assert gc.isenabled()
    with without_collector():
        assert not gc.isenabled()
        with without_collector():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), without_collector():
        raise KeyError
    assert gc.isenabled()


def test_who_had_switched_it_off_has_it_off() -> None:
    gc.disable()
    try:
        with without_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_load_that_fails_leaves_it_on(tmp_path) -> None:
    with pytest.raises(RankloadError):
        load(tmp_path / "nothing.pt", State(torch.nn.Linear(1, 1)))
    assert gc.isenabled()


def test_what_was_made_lately_can_be_freed_inside() -> None:
    class Loop:
        def __init__(self) -> None:
            self.itself = self

    gc.collect()  # how old what is held becomes depends on what was made before
    with without_collector():
        held = [Loop() for _ in range(5)]
        for number in range(40):
            seen = weakref.ref(Loop())
            collect_young()
            assert seen() is None
            if number == 3:
                late = weakref.ref(held.pop())  # it was in use at the calls before
        assert late() is None
