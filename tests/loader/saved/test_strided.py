"""Boxes that cut strided tensors: each element once, in order, within a limit."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from rankload.loader.saved.strided import Box, Layout, bounded_boxes, row_major_boxes
from region_cases import SHAPES, Shape, elements, offsets


@given(SHAPES, st.data())
@settings(max_examples=200)
def test_boxes_cover_each_element_once_and_in_order(shape: Shape, data: st.DataObject) -> None:
    total = math.prod(shape)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    boxes = list(row_major_boxes(shape, start, stop))
    got = [at for box in boxes for at in elements(shape, box).reshape(-1).tolist()]
    assert got == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=4), st.integers(1, 40))
@settings(max_examples=200)
def test_bounded_boxes_cover_a_layout(dims: list[tuple[int, int]], limit: int) -> None:
    layout = Layout(tuple(size for size, _ in dims), tuple(step for _, step in dims), 3)
    seen = np.zeros(layout.shape, dtype=int)
    for box in bounded_boxes(layout, limit):
        assert layout.part(box).span <= limit
        seen[tuple(slice(a, a + n) for a, n in zip(box.starts, box.sizes, strict=True))] += 1
    assert (seen == 1).all()


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=4))
def test_span_and_contiguity_are_those_of_the_elements(dims: list[tuple[int, int]]) -> None:
    layout = Layout(tuple(size for size, _ in dims), tuple(step for _, step in dims), 3)
    lies = offsets(layout.shape, layout.stride, layout.offset).reshape(-1)
    assert layout.numel == lies.size
    assert layout.span == (lies.max() + 1 - 3 if lies.size else 0)
    if lies.size:
        assert layout.is_contiguous == (lies.tolist() == list(range(3, 3 + lies.size)))


def test_a_part_of_a_layout_begins_at_its_corner() -> None:
    part = Layout((4, 6), (1, 5), 2).part(Box((1, 3), (2, 2)))
    assert part == Layout((2, 2), (1, 5), 2 + 1 + 15)
