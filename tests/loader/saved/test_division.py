"""What is worked out once for tensors that are cut alike: whether boxes cover them, their order, and which meet."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.saved.division import Division
from rankload.loader.saved.regions import Region, Run
from rankload.loader.saved.strided import Box


def elements(shape: tuple[int, ...], region: Region) -> set[int]:
    """The row-major positions of a region's elements."""
    if isinstance(region, Run):
        return set(range(region.start, region.stop))
    found = set()
    ranges = [range(start, start + size) for start, size in zip(region.starts, region.sizes, strict=True)]
    for place in itertools.product(*ranges):
        position = 0
        for index, size in zip(place, shape, strict=True):
            position = position * size + index
        found.add(position)
    return found


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    starts = [draw(st.integers(0, size)) for size in shape]
    sizes = [draw(st.integers(0, size - start)) for start, size in zip(starts, shape, strict=True)]
    return Box(tuple(starts), tuple(sizes))


@given(st.data())
def test_any_boxes(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=3)))
    cut = data.draw(st.lists(boxes(shape), max_size=6))
    division = Division(shape, tuple(cut))
    held = [elements(shape, box) for box in cut]
    numel = len(elements(shape, Box((0,) * len(shape), shape)))
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

    start = data.draw(st.integers(0, numel))
    regions: list[Region] = [Run(start, data.draw(st.integers(0, numel - start)))]
    regions += data.draw(st.lists(boxes(shape), max_size=2))
    wanted = [elements(shape, region) for region in regions]
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
