"""The block without Python's collector of reference cycles."""

from __future__ import annotations

import gc

import pytest
import torch
from rankload.loader import RankloadError, State, load
from rankload.loader.collector import without_collector


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
