"""What ranks send to each other: it comes back as it was, and what cannot is refused by name."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Optional

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.distributed.range_server import PeerAddress
from rankload.loader.byte_ranges import ByteRange
from rankload.loader.cache.homes import Room
from rankload.loader.fetch.files import FetchedFile
from rankload.loader.fetch.plan import FetchPlan, FetchRequest
from rankload.loader.fetch.remote_files import ObjectPart
from rankload.loader.fetch.space_check import RoomReport
from rankload.loader.stores.locate import Located
from rankload.loader.verify.joint import StorageId, StorageRead
from rankload.loader.wire import decode, encode

texts = st.text(max_size=8)
numbers = st.integers(0, 1 << 62)
ranges = st.tuples(numbers, numbers).map(lambda two: ByteRange(min(two), max(two)))
some_ranges = st.lists(ranges, max_size=4)
many = some_ranges.map(tuple)
parts = st.builds(
    ObjectPart, texts, numbers, st.none() | texts, st.none() | texts, numbers, st.none() | numbers
)
files = st.builds(
    FetchedFile,
    name=texts,
    source=texts,
    path=texts,
    kind=st.sampled_from(["file", "archive"]),
    members=st.lists(texts).map(tuple),
    size_bytes=st.integers(-1),
    fetched_bytes=numbers,
    parts=st.dictionaries(texts, parts, max_size=2),
    compared_by=st.lists(texts).map(tuple),
    left_out=st.lists(texts).map(tuple),
)
by_file = st.dictionaries(texts, some_ranges, max_size=3)


def sent(kind: Any, value: Any) -> Any:
    """`value` after its way to another rank."""
    return decode(kind, json.loads(json.dumps(encode(value))))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (FetchRequest, st.builds(FetchRequest, numbers, *[st.dictionaries(texts, many, max_size=3)] * 2)),
        (FetchPlan, st.builds(FetchPlan, by_file, st.dictionaries(numbers, by_file, max_size=3), by_file)),
        (dict[str, FetchedFile], st.dictionaries(texts, files, max_size=3)),
        (
            dict[StorageId, StorageRead],
            st.dictionaries(
                st.tuples(texts, texts),
                st.builds(StorageRead, numbers, numbers, many, st.lists(texts).map(tuple)),
                max_size=3,
            ),
        ),
        (dict[StorageId, tuple[int, ...]], st.dictionaries(st.tuples(texts, texts), st.just((1, 2)))),
        (
            RoomReport,
            st.builds(
                RoomReport,
                numbers,
                texts,
                numbers,
                st.lists(st.builds(Room, texts, numbers, numbers, st.booleans())).map(tuple),
            ),
        ),
        (Located, st.builds(Located, texts, texts, texts, st.none() | texts, st.booleans())),
        (PeerAddress, st.builds(PeerAddress, texts, texts, st.lists(texts).map(tuple), numbers, texts)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
@given(data=st.data())
def test_what_ranks_send_comes_back(kind: Any, values: st.SearchStrategy[Any], data: st.DataObject) -> None:
    value = data.draw(values)
    assert sent(kind, value) == value


class Pair(NamedTuple):
    first: int
    others: list[str]


@dataclass(frozen=True, slots=True)
class Base:
    number: float
    color: Literal["red", "blue", 3] = "red"


@dataclass(frozen=True, slots=True, kw_only=True)
class Everything(Base):
    """Each kind of hint once."""

    pair: Pair
    fixed: tuple[str, Pair, bool]
    some: tuple[Pair, ...] = ()
    anything: list[int | str | float | bool | None] = field(default_factory=list)
    maybe: Pair | None = None
    optional: Optional[tuple[int, ...]] = None  # noqa: UP045 -- as some libraries write it
    plain: frozenset[int | str] = frozenset()
    by_name: Mapping[str, Sequence[Pair]] = field(default_factory=dict)
    by_place: dict[tuple[str, int], dict[int, None]] = field(default_factory=dict)


pairs = st.builds(Pair, st.integers(), st.lists(texts, max_size=3))
plain_values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts


@given(
    st.builds(
        Everything,
        number=st.floats(allow_nan=False) | st.integers(),
        color=st.sampled_from(["red", "blue", 3]),
        pair=pairs,
        fixed=st.tuples(texts, pairs, st.booleans()),
        some=st.lists(pairs, max_size=3).map(tuple),
        anything=st.lists(plain_values),
        maybe=st.none() | pairs,
        optional=st.none() | st.lists(st.integers()).map(tuple),
        plain=st.frozensets(st.integers() | texts),
        by_name=st.dictionaries(texts, st.lists(pairs, max_size=3).map(tuple), max_size=3),
        by_place=st.dictionaries(
            st.tuples(texts, st.integers()), st.dictionaries(st.integers(), st.none()), max_size=3
        ),
    )
)
def test_every_hint_comes_back(value: Everything) -> None:
    again = sent(Everything, value)
    assert again == value
    assert type(again.pair) is Pair
    assert all(type(one) is Pair for one in again.some)
    assert list(map(type, again.anything)) == list(map(type, value.anything))


RECORD = encode(Everything(number=1, pair=Pair(1, ["a"]), fixed=("b", Pair(2, []), True)))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, "1", r"Everything\.number: expected float, got a value of type str"),
        (0, True, r"Everything\.number: expected float, got a value of type bool"),
        (1, "green", r"Everything\.color: expected one of 'red', 'blue', 3, got a value of type str"),
        (1, 3.0, r"Everything\.color: expected one of"),
        (2, [1], r"Everything\.pair: Pair: expected its 2 fields as a list, got a list of 1"),
        (2, [1.5, []], r"Everything\.pair: Pair\.first: expected int, got a value of type float"),
        (2, {"first": 1, "others": []}, r"Everything\.pair: Pair: expected its 2 fields as a list, got"),
        (2, [1, "abc"], r"Everything\.pair: Pair\.others: expected a list, got a value of type str"),
        (3, ["a", [1, []]], r"Everything\.fixed: expected a list of 3 items, got a list of 2"),
        (4, None, r"Everything\.some: expected a list, got None"),
        (5, [[]], r"Everything\.anything: expected None or bool or float or int or str, got a list of 0"),
        (6, 0, r"Everything\.maybe: Pair: expected its 2 fields"),
        (9, {"a": []}, r"Everything\.by_name: expected a list, got a value of type dict"),
        (9, [["a", [], 1]], r"Everything\.by_name: expected a list of 2 items, got a list of 3"),
        (9, [["a", []], ["a", []]], r"Everything\.by_name: has a key twice among 2"),
        (10, [["a", []]], r"Everything\.by_place: expected a list of 2 items, got a value of type str"),
    ],
)
def test_what_another_version_sent_is_refused(place: int, value: Any, message: str) -> None:
    assert decode(Everything, RECORD).color == "red"
    record = json.loads(json.dumps(RECORD))
    record[place] = value
    with pytest.raises(ValueError, match=message):
        decode(Everything, record)
    wrongs: list[Any] = [record[:-1], [*record, 1], None, {}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="Everything: expected its 11 fields"):
            decode(Everything, wrong)


@dataclass
class Loose:
    what: Any


@dataclass
class Whole:
    size: int

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("has a size below 0")


def test_what_a_class_refuses_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match="Whole: has a size below 0"):
        decode(Whole, [-1])


def test_values_of_derived_classes_are_sent_as_what_they_are_derived_from() -> None:
    class Name(str):
        def __str__(self) -> str:
            return "another"

    given = [numpy.str_("a"), Name("b"), numpy.float64(1.5), signal.SIGINT, None]
    for values in (given, *([one] for one in given)):
        made = encode(values)
        assert made == values
        assert {type(one) for one in made} <= {str, float, int, type(None)}


def test_what_cannot_be_sent_is_a_mistake() -> None:
    for value in (b"x", object(), 3j, [1, {2: b"x"}], Whole):
        with pytest.raises(TypeError, match="cannot be sent to other ranks"):
            encode(value)
    kinds: list[Any] = [bytes, dict, Any, Pair | Whole, list[Any], tuple[Whole | str, int]]
    for kind in kinds:
        with pytest.raises(TypeError):
            decode(kind, [])
    with pytest.raises(TypeError, match="Loose: "):
        decode(Loose, [1])


def test_messages_hold_no_text_of_the_record() -> None:
    with pytest.raises(ValueError, match=r"Located") as caught:
        decode(Located, ["file", "https://me:secret@host", "x", 3, "secret"])
    assert "secret" not in str(caught.value)


def test_a_hundred_thousand_ranges_take_little_time() -> None:
    told = FetchPlan({"a": [ByteRange(10 * at, 10 * at + 5) for at in range(100_000)]})
    begun = time.process_time()
    assert sent(FetchPlan, told) == told
    assert time.process_time() - begun < 2
