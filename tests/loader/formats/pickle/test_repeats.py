"""What repeats in a pickle is followed at once, and with the outcome that the scan has opcode by opcode."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rankload.loader.errors import RankloadError
from rankload.loader.formats.pickle.repeats import Repeats
from rankload.loader.formats.pickle.scan import PickleScan, scan_pickle

LIMIT = 64 << 20


class Address:
    """Is pickled as a new object with a state."""

    def __init__(self, start: int) -> None:
        self.start = start


def saved(value: Any, protocol: int) -> bytes:
    """The pickle of a file that ``torch.save`` writes."""
    stream = io.BytesIO()
    torch.save(value, stream, pickle_protocol=protocol)
    with zipfile.ZipFile(stream) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith("/data.pkl"))
        return archive.read(name)


@cache
def real(kind: str, protocol: int = 2) -> bytes:
    """A pickle of 400 parameters, as checkpoints hold them."""
    n = 400
    flat = torch.zeros(16 * n)
    if kind == "views":
        return saved(
            OrderedDict((f"layer.{i}.weight", flat[16 * i : 16 * i + 16]) for i in range(n)), protocol
        )
    if kind == "shapes":
        return saved({f"layer.{i}": torch.Size((i % 3, 16)) for i in range(n)}, protocol)
    if kind == "objects":
        return pickle.dumps({f"layer.{i}": Address(16 * i) for i in range(n)}, protocol)
    parameters = [torch.nn.Parameter(torch.zeros(3, 2)) for _ in range(n)]
    optimizer = torch.optim.AdamW(parameters)
    for one in parameters:
        one.grad = torch.ones(3, 2)
    optimizer.step()
    return saved({"model": dict(enumerate(parameters)), "optimizer": optimizer.state_dict()}, protocol)


KINDS = ("views", "shapes", "objects", "optimizer")


def outcome(data: bytes, limit: int = LIMIT) -> PickleScan | tuple[str, str]:
    try:
        return scan_pickle(data, name="f", memory_limit=limit)
    except RankloadError as error:
        return type(error).__name__, str(error)


def opcode_by_opcode(data: bytes, limit: int = LIMIT) -> PickleScan | tuple[str, str]:
    with mock.patch.object(Repeats, "follow", lambda self, pos, memory: (pos, memory)):
        return outcome(data, limit)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_most_of_a_checkpoints_pickle_is_followed_at_once(kind: str, protocol: int) -> None:
    data, follow = real(kind, protocol), Repeats.follow
    met: list[int] = []

    def noted(self: Repeats, pos: int, memory: int) -> Any:
        end, counted = follow(self, pos, memory)
        met.append(end - pos)
        return end, counted

    with mock.patch.object(Repeats, "follow", noted):
        scanned = outcome(data)
    assert scanned == opcode_by_opcode(data)
    assert isinstance(scanned, PickleScan)
    assert scanned.end == len(data)
    # What is new is scanned once, by itself; after it, the scan is called for no parameter.
    assert len(met) < 100
    assert sum(met) > 0.95 * len(data)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_a_changed_pickle_has_the_same_outcome(data: st.DataObject) -> None:
    pickled = bytearray(real(data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from([2, 4]))))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(pickled) - 1))
        change = data.draw(st.sampled_from(["byte", "cut", "again", "opcodes"]))
        if change == "byte":
            pickled[at] = data.draw(st.integers(0, 255))
        elif change == "cut":
            del pickled[at : at + data.draw(st.integers(1, 40))]
        elif change == "again":
            pickled[at:at] = pickled[at : at + data.draw(st.integers(1, 200))]
        else:
            pickled[at:at] = data.draw(st.binary(min_size=1, max_size=6))
    changed = bytes(pickled)
    assert outcome(changed) == opcode_by_opcode(changed)


@given(st.sampled_from(KINDS), st.integers(1, 1 << 20))
@settings(max_examples=100, deadline=None)
def test_the_bound_of_memory_is_met_at_the_same_byte(kind: str, limit: int) -> None:
    assert outcome(real(kind), limit) == opcode_by_opcode(real(kind), limit)


@given(
    st.lists(
        st.sampled_from(
            [
                b"X\x01\0\0\0a",
                b"X\x02\0\0\0bc",
                b"(K\x01K\x02K\x03t",
                b"}q\x00(h\x00K\x01K\x02u",
                b"]r\x05\0\0\0(K\x01K\x02e",
                b"K\x01K\x02\x860",
                b"\x94K\x01\x85\x94\x85\x94\x850",
                b"2222000000",
                b"h\x00h\x01h\x02\x87\x94",
                b"(1((K\x01K\x0212",
                b"ctorch\nSize\n)RK\x01K\x02b",
                b"(K\x01I1\nJ\0\0\0\0t\x85\x85\x85",
                b"G\0\0\0\0\0\0\0\0\x85K\x01\x86K\x02s",
            ]
        ),
        min_size=2,
        max_size=8,
    ),
    st.integers(1, 400),
)
@settings(max_examples=400, deadline=None)
def test_any_opcodes_that_repeat_have_the_same_outcome(parts: list[bytes], times: int) -> None:
    body = b"".join(parts)
    data = b"\x80\x02(" + body * (1 + 4200 // len(body)) + body * times + b"t."
    assert outcome(data) == opcode_by_opcode(data)


def test_an_entry_of_the_memo_that_changes_is_read_as_it_is_then() -> None:
    """A call of what is no class is refused, also where many calls of a class at this place were followed before."""
    item = b"X\x04\0\0\0nameh\x00)RK\x01K\x02\x86\x860"
    good = b"\x80\x02ctorch\nSize\nq\x00(" + item * 400
    assert isinstance(outcome(good + b"t\x86."), PickleScan)
    changed = good + b"K\x01q\x000" + item * 4 + b"t\x86."
    assert outcome(changed) == opcode_by_opcode(changed)
    assert "a call of something that is no class" in outcome(changed)[1]  # type: ignore[index]
