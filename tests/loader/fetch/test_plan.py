"""Who fetches what, compared with counting every byte by itself."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rankload.loader.byte_ranges import RECORD_GAP_BYTES, ByteRange, once, total_bytes, union
from rankload.loader.fetch.plan import FetchRequest, plan_fetch
from rankload.loader.options import Mode

SIZE = 60


@st.composite
def requests(draw: st.DrawFn) -> list[FetchRequest]:
    spans = st.lists(
        st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda two: ByteRange(min(two), max(two))),
        max_size=5,
    )
    found = []
    for node in draw(st.lists(st.integers(0, 2), min_size=1, max_size=6)):
        wanted = {name: union(draw(spans)) for name in ("a", "b")}
        # Some of it, cut where wanted ranges are.
        direct = {name: [one for one in ranges if draw(st.booleans())] for name, ranges in wanted.items()}
        found.append(FetchRequest(node, wanted, direct))
    return found


def bytes_of(ranges: dict[str, list[ByteRange]]) -> set[tuple[str, int]]:
    return {
        (name, at) for name, spans in ranges.items() for start, stop in spans for at in range(start, stop)
    }


def wanted_bytes(ranges: object) -> set[tuple[str, int]]:
    return bytes_of({name: list(spans) for name, spans in ranges.items()})  # type: ignore[attr-defined]


@settings(max_examples=300)
@given(requests(), st.sampled_from(["node", "direct", "auto", "job"]))
def test_every_node_gets_what_its_ranks_want(told: list[FetchRequest], mode: Mode) -> None:
    plans = plan_fetch(told, mode)
    from_store: list[tuple[str, int]] = []
    for node in {request.node for request in told}:
        ranks = [rank for rank, request in enumerate(told) if request.node == node]
        leader = ranks[0]
        wanted = set().union(*(wanted_bytes(told[rank].wanted) for rank in ranks))
        comes = bytes_of(plans[leader].bring)
        for rank in ranks:
            assert rank == leader or not (plans[rank].bring or plans[rank].take)
        taken = [(giver, bytes_of(ranges)) for giver, ranges in plans[leader].take.items()]
        for giver, some in taken:
            assert mode == "job"
            assert not comes & some
            assert some <= bytes_of(plans[giver].bring), "is taken from a rank that does not have it"
            comes |= some
        direct = [bytes_of(plans[rank].direct) for rank in ranks]
        along: set[tuple[str, int]] = set()
        for rank, own in zip(ranks, direct, strict=True):
            assert mode in ("direct", "auto") or not own
            assert own <= wanted_bytes(told[rank].direct)
            assert not own & set().union(*(wanted_bytes(told[r].wanted) for r in ranks if r != rank))
            assert not own & comes
            brought_along = bytes_of(plans[rank].along)
            assert mode in ("direct", "auto") or not brought_along
            assert brought_along <= wanted_bytes(told[rank].wanted) - own - comes
            assert not brought_along & set().union(
                *(wanted_bytes(told[r].wanted) for r in ranks if r != rank)
            )
            assert not brought_along or own, "nothing that it could come along with"
            along |= brought_along
            if mode == "direct":
                private = wanted_bytes(told[rank].direct) - set().union(
                    *(wanted_bytes(told[r].wanted) for r in ranks if r != rank)
                )
                assert own == private
        assert sum(plans[leader].along_bytes.values()) == len(along)
        come = comes | along | set().union(*direct)
        assert wanted <= come
        for name, at in come - wanted:
            # What lies between two records comes with them.
            others = [other for file, other in wanted if file == name]
            before, after = max(one for one in others if one < at), min(one for one in others if one > at)
            assert after - before <= RECORD_GAP_BYTES + 1
        from_store += [*bytes_of(plans[leader].bring), *along, *(one for own in direct for one in own)]
    if mode == "job":
        assert len(from_store) == len(set(from_store)), "leaves the store twice"


def test_long_ranges_go_straight_and_short_ones_do_not_with_auto() -> None:
    long, short = ByteRange(0, 1 << 20), ByteRange(2 << 20, (3 << 20) - 1)
    (plan,) = plan_fetch([FetchRequest(0, {"a": [long, short]}, {"a": [long, short]})], "auto")
    assert plan.direct == {"a": [long]}
    assert plan.bring == {"a": [short]}


MIB = 1 << 20


def one_file(wanted: list[ByteRange], direct: list[ByteRange], node: int = 0) -> FetchRequest:
    return FetchRequest(node, {"a": wanted}, {"a": direct})


@pytest.mark.parametrize("mode", ["direct", "auto"])
def test_short_ranges_come_along_with_direct_ones_and_long_ones_do_not(mode: Mode) -> None:
    first, short = ByteRange(0, 9 * MIB), ByteRange(9 * MIB, 10 * MIB)
    second, long = ByteRange(10 * MIB, 20 * MIB), ByteRange(20 * MIB, 22 * MIB)
    (plan,) = plan_fetch([one_file([first, short, second, long], [first, second])], mode)
    assert plan.direct == {"a": [first, second]}
    assert plan.along == {"a": [short]}
    assert plan.along_bytes == {"a": MIB}
    assert plan.bring == {"a": [long]}


def test_what_another_rank_wants_too_comes_by_the_leader() -> None:
    first, short, second = ByteRange(0, 9 * MIB), ByteRange(9 * MIB, 10 * MIB), ByteRange(10 * MIB, 20 * MIB)
    other = ByteRange(1 << 30, (1 << 30) + 9 * MIB)
    told = [one_file([first, short, second], [first, second]), one_file([short, other], [other])]
    plans = plan_fetch(told, "direct")
    assert [plan.along for plan in plans] == [{}, {}]
    assert plans[0].bring == {"a": [short]}


def test_auto_leaves_all_to_the_leader_for_a_rank_that_is_to_have_all_before_any_changes() -> None:
    """A rank that reads little has all of it before any rank changes anything; alone, it reads it apart."""
    small, large = ByteRange(0, 60 * MIB), ByteRange(1 << 30, (1 << 30) + 65 * MIB)
    plans = plan_fetch([one_file([small], [small]), one_file([large], [large])], "auto")
    assert [plan.direct for plan in plans] == [{}, {"a": [large]}]
    assert plans[0].bring == {"a": [small]}
    (alone,) = plan_fetch([one_file([small], [small])], "auto")
    assert alone.direct == {"a": [small]}


def test_auto_leaves_short_direct_ranges_to_the_leader_where_it_reads_beside_them() -> None:
    """So no rank's requests come on top of those that the leader sends anyway."""
    turns = [ByteRange(at * 4 * MIB, (at + 1) * 4 * MIB) for at in range(40)]
    told = [one_file(turns[rank::2], turns[rank::2]) for rank in range(2)]
    plans = plan_fetch(told, "auto")
    assert [plan.direct for plan in plans] == [{}, {}]
    assert plans[0].bring == {"a": [ByteRange(0, 160 * MIB)]}
    # Large turns are read directly, unless many small ranges between them are left, which both want.
    turns = [ByteRange(at * 17 * MIB, at * 17 * MIB + 16 * MIB) for at in range(10)]
    both = [ByteRange(turn.stop, turn.stop + 1000) for turn in turns]
    for small, direct in (([], [turns[::2], turns[1::2]]), (both, [[], []])):
        plans = plan_fetch([one_file([*turns[rank::2], *small], turns[rank::2]) for rank in range(2)], "auto")
        assert [plan.direct.get("a", []) for plan in plans] == direct
        assert plans[0].bring.get("a", []) == ([*union(turns, both)] if small else [])
    apart = [ByteRange(at * 10 * MIB, at * 10 * MIB + 4 * MIB) for at in range(40)]
    plans = plan_fetch([one_file(apart[rank::2], apart[rank::2]) for rank in range(2)], "auto")
    assert [plan.direct["a"] for plan in plans] == [apart[::2], apart[1::2]]


def test_nodes_share_the_work_of_what_all_want() -> None:
    whole = {"a": [ByteRange(0, 100 << 20)]}
    plans = plan_fetch([FetchRequest(node, whole) for node in (0, 0, 1, 2, 2)], "job")
    own = [total_bytes(plans[rank].bring["a"]) for rank in (0, 2, 3)]
    assert sum(own) == 100 << 20
    assert max(own) - min(own) <= 16 << 20


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda two: (min(two), max(two)))))
def test_once_is_what_lies_in_one_range_alone(spans: list[tuple[int, int]]) -> None:
    count = [sum(start <= at < stop for start, stop in spans) for at in range(31)]
    assert {at for start, stop in once(spans) for at in range(start, stop)} == {
        at for at, depth in enumerate(count) if depth == 1
    }


@pytest.mark.parametrize("mode", ["node", "job"])
def test_one_node_fetches_for_itself(mode: Mode) -> None:
    (first, second) = plan_fetch(
        [FetchRequest(7, {"a": [ByteRange(0, 5)]}), FetchRequest(7, {"a": [ByteRange(3, 9)]})], mode
    )
    assert first.bring == {"a": [ByteRange(0, 9)]}
    assert not first.take
    assert not second.bring
