"""The scan lets every real pickle pass, and stops what would cost the unpickler too much."""

from __future__ import annotations

import io
import pickle
import pickletools
import random
import time
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rankload.loader.errors import CorruptError, RankloadError, UnsafeError
from rankload.loader.formats.pickle.read import read_pickle
from rankload.loader.formats.pickle.scan import scan_beginning, scan_pickle
from rankload.loader.saved import tree

LIMIT = 64 << 20

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.tuples(inner, inner)
        | st.frozensets(st.text())
    ),
    max_leaves=30,
)


def scan(data: bytes, limit: int = LIMIT):
    return scan_pickle(data, name="f", memory_limit=limit)


@given(plain, st.integers(0, 5))
@settings(max_examples=300)
def test_what_pickle_writes_passes(value, protocol) -> None:
    data = pickle.dumps(value, protocol)
    assert scan(data).end == len(data)
    assert scan_pickle(b"xx" + data + b"yy", name="f", start=2, memory_limit=LIMIT).end == len(data) + 2


@given(plain, st.integers(0, 5))
@settings(max_examples=100)
def test_every_cut_is_seen(value, protocol) -> None:
    data = pickle.dumps(value, protocol)
    for size in {*range(min(len(data), 40)), len(data) - 1}:
        with pytest.raises(CorruptError):
            scan(data[:size])
        assert scan_beginning(data[:size], name="f", memory_limit=LIMIT) is None


def test_other_picklers_pass() -> None:
    value = {"a": [1, 2, (3, "x" * 70000)], 5: {1, 2}, "b": b"\0" * 300}
    for protocol in range(6):
        stream = io.BytesIO()
        pickle._Pickler(stream, protocol).dump(value)
        assert scan(stream.getvalue()).end == len(stream.getvalue())
        assert scan(pickletools.optimize(stream.getvalue())).end


def tuple_bomb(levels: int, tail: bytes) -> bytes:
    """A dict whose key is a tuple of two of the same tuple, and so on: 2**levels leaves to hash."""
    return b"\x80\x02}K\x01\x85" + b"2\x86" * levels + tail


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\x80\x02Nr\x00\xe1\xf5\x05.", UnsafeError),  # memo index 100,000,000
        (b"\x80\x02Np99999999\n.", UnsafeError),
        (b"\x80\x06N.", CorruptError),
        (b"\x80\x02\x82\x01.", UnsafeError),  # extension registry
        (b"\x80\x02\x83\x01\x00.", UnsafeError),
        (b"\x80\x02\x84\x01\x00\x00\x00.", UnsafeError),
        (b"\x80\x05\x97.", UnsafeError),  # out-of-band buffers
        (b"\x80\x05N\x98.", UnsafeError),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", CorruptError),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.", CorruptError),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\xff.", CorruptError),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", CorruptError),
        (b"\x80\x02\x8b\xff\xff\xff\xff.", CorruptError),  # negative length
        (b"\x80\x02T\xff\xff\xff\xff.", CorruptError),
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.", CorruptError),
        (b"]" * 1_000_000 + b"a" * 999_999 + b".", UnsafeError),
        (b"]" * 300 + b"a" * 299 + b".", UnsafeError),
        (b"N" + b"\x85" * 1_000_000 + b".", UnsafeError),
        (tuple_bomb(100, b"Ns."), UnsafeError),
        (b"\x80\x04(" + tuple_bomb(100, b"")[3:] + b"\x91.", UnsafeError),
        (tuple_bomb(60, b"Ns."), UnsafeError),
        (b"\x80\x02h\x05.", CorruptError),
        (b"\x80\x02.", CorruptError),
        (b"\x80\x02NN.", CorruptError),
        (b"\x80\x02(N.", CorruptError),
        (b"\x80\x02}Na.", CorruptError),  # append to a dict
        (b"\x80\x02]NNs.", CorruptError),  # items of a list: slices could double it
        (b"\x80\x02](Nu.", CorruptError),
        (b"\x80\x02}(Nu.", CorruptError),
        (b"\x80\x02N)R.", CorruptError),
        (b"\x80\x02cos\nsystem\n}b.", UnsafeError),  # the state of a function
        (b"\x80\x02]}b.", UnsafeError),
        (b"\x80\x02cos\nsystem", CorruptError),
        (b"c" + b"a" * 600 + b"\nb\n.", CorruptError),
        (b"L" + b"9" * 5000 + b"L\n.", CorruptError),
        (b"I" + b"9" * 5000 + b"\n.", CorruptError),
        (b"\x80\x02\x00.", CorruptError),
        (b"", CorruptError),
    ],
)
def test_what_no_pickler_writes(data: bytes, kind: type[RankloadError]) -> None:
    begun = time.process_time()
    with pytest.raises(kind) as caught:
        scan(data)
    assert time.process_time() - begun < 5
    assert str(caught.value).startswith("f: the pickle at byte ")


def test_memory_is_bounded_by_the_limit() -> None:
    for unit in (b"N", b"]", b"}", b")", b"K\x01", b"(", b"\x8f", b"X\x00\x00\x00\x00", b"J\0\1\2\3"):
        with pytest.raises(UnsafeError, match="more than"):
            scan(b"\x80\x04" + unit * 2_000_000 + b".", 10 << 20)
    with pytest.raises(UnsafeError, match="more than"):
        scan(b"\x80\x02" + b"]q\x000" * 2_000_000 + b"N.", 10 << 20)


def test_keys_whose_hashes_collide() -> None:
    prime = 2**61 - 1
    values = dict.fromkeys(prime * (n + 1) for n in range(200))
    assert scan(pickle.dumps(values, 2)).end
    many = b"".join(b"\x8a\x0b" + (prime * (n + 1)).to_bytes(11, "little") + b"N" for n in range(12_000))
    with pytest.raises(UnsafeError, match="hash"):
        scan(b"\x80\x02}(" + many + b"u.")


def test_ordinary_keys_are_not_limited() -> None:
    value = {("a", n): n for n in range(50_000)} | dict.fromkeys(range(50000), 0.5)
    assert scan(pickle.dumps(value, 4)).end


def test_many_uses_of_one_large_key() -> None:
    key = b"(" + b"K\x01" * 20_000 + b"tq\x00"
    with pytest.raises(UnsafeError, match="hash"):
        scan(b"\x80\x02}" + key + b"Ns" + b"h\x00Ns" * 50_000 + b".")


def test_it_is_fast_enough() -> None:
    random.seed(0)
    value = {f"layer.{n}.weight": (n, [n, n + 1], {"a": (1, 2, 3.0)}) for n in range(20_000)}
    data = pickle.dumps(value, 2)
    begun = time.process_time()
    scan(data, 1 << 30)
    # About 18 opcodes an entry; a microsecond each is what is measured here, with room for slow machines.
    assert time.process_time() - begun < 20_000 * 18 * 1e-5


@pytest.mark.parametrize(
    ("data", "shares"),
    [
        (pickle.dumps({"a": [1.5, (2, 3)], "b": [{}, set()]}, 2), False),
        (pickle.dumps([(0.9, 0.999)] * 3, 2), False),
        (pickle.dumps(["name", 1 << 70] * 3, 2), False),
        (pickle.dumps([tuple(range(15))] * 3, 2), False),
        (pickle.dumps([tuple(range(16))] * 3, 2), True),
        (pickle.dumps([((1, 2), 3)] * 3, 2), True),
        (pickle.dumps([[]] * 3, 2), True),
        (pickle.dumps([{1: 2}] * 3, 2), True),
        (pickle.dumps([frozenset({1})] * 3, 4), True),
        (pickle.dumps([range(3)] * 3, 2), True),
        (b"(]2t.", True),
        (b"(K\x012t.", False),
        # What a persistent id holds may come out of it again.
        (b"(X\x06\0\0\0module(]t\x86Q\x85q\x00h\x00t.", True),
    ],
)
def test_it_says_whether_anything_large_is_used_twice(data: bytes, shares: bool) -> None:
    assert scan(data).shares is shares


things = st.recursive(
    st.sampled_from([b"K\x01", b"]", b"}", b")", b"G" + bytes(8), b"h\x00", b"h\x01", b"h\x02", b"h\x03"]),
    lambda inner: (
        st.tuples(inner, st.sampled_from([b"\x85", b"2\x86", b"2K\x01\x87"])).map(b"".join)
        | st.tuples(st.just(b"]"), inner, st.just(b"a")).map(b"".join)
        | st.tuples(st.just(b"}K\x01"), inner, st.just(b"s")).map(b"".join)
        | st.tuples(st.just(b"\x8c\x06module"), inner, st.just(b"\x86Q")).map(b"".join)
        | st.tuples(st.just(b"ctypes\nSimpleNamespace\n)\x81"), inner, st.just(b"b")).map(b"".join)
    ),
    max_leaves=3,
)
uses = st.tuples(st.sampled_from([b"h\x00", b"h\x01K\x01", b"h\x02"]), things)


@given(st.lists(things, max_size=4), st.lists(uses.map(b"".join), max_size=2))
@settings(max_examples=500, deadline=None)
def test_a_tree_in_which_nothing_is_used_twice_can_be_walked(new: list[bytes], filled: list[bytes]) -> None:
    """`check_tree`, which is not asked for such a pickle, would let it pass, were it ever so strict."""
    fill = {0: b"a", 1: b"s", 2: b"b"}
    statements = [*new, *(each + fill[each[1]] for each in filled)]
    begin = b"\x80\x04(]\x94}\x94ctypes\nSimpleNamespace\n)\x81\x94K\x01K\x02\x86\x94"
    data = begin + b"".join(statements) + b"t."
    scanned = scan(data)
    found = read_pickle(data, scanned, name="f", memory_limit=LIMIT)
    if not scanned.shares:
        with mock.patch.object(tree, "MAX_UNSHARED", 0):
            tree.check_tree(found, name="f")
