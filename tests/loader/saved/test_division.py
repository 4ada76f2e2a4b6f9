"""What is worked out once for tensors that are cut alike: whether boxes cover them, their order, and which meet."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.saved.division import Division
from rankload.loader.saved.regions import Region, whole_box
from rankload.loader.saved.strided import Box
from region_cases import boxes, positions, runs


@given(st.data())
def test_any_boxes(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=3)))
    cut = data.draw(st.lists(boxes(shape), max_size=6))
    division = Division(shape, tuple(cut))
    held = [positions(shape, box) for box in cut]
    numel = len(positions(shape, whole_box(shape)))
    filled = [number for number, own in enumerate(held) if own]
    firsts = {cut[number]: number for number in reversed(filled)}
    assert sorted(division.order) == sorted(firsts.values())
    assert [min(held[number]) for number in division.order] == sorted(
        min(held[one]) for one in firsts.values()
    )
    for number, box in enumerate(cut):
        place = division.place[number]
        assert place == -1 if not held[number] else cut[division.order[place]] == box
    covers = sum(len(held[number]) for number in division.order) == numel == len(set().union(*held))
    assert (division.problem == "") == covers

    regions: list[Region] = [data.draw(runs(shape))]
    regions += data.draw(st.lists(boxes(shape), max_size=2))
    wanted = [positions(shape, region) for region in regions]
    expected = {
        number: any(held[number] <= own for own in wanted)
        for number in division.order
        if any(held[number] & own for own in wanted)
    }
    assert dict(division.meeting(regions)) == expected


def test_tensors_that_are_cut_alike_are_equal() -> None:
    box = Box((0,), (3,))
    assert Division((3,), (box,)) == Division((3,), (Box((0,), (3,)),))
    assert Division((3,), (box,)) != Division((4,), (box,))
