"""What shapes tell of the dimensions of features."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodecouple.objectives.layout import Layout, similar_grid
from autodecouple.plans import TensorSpec


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple), st.integers(1, 4), st.integers(-2, 30))
def test_similar_grids_are_found_and_none_else(base: tuple[int, ...], scale: int, length: int) -> None:
    grown = tuple(scale * size for size in base)
    assert similar_grid(math.prod(grown), base) == grown
    grids = itertools.product(range(1, length + 1), repeat=len(base))
    expected = [
        grid
        for grid in grids
        if math.prod(grid) == length and all(a * base[0] == grid[0] * b for a, b in zip(grid, base, strict=True))
    ]
    assert similar_grid(length, base) == (expected[0] if expected else None)


@pytest.mark.parametrize(
    "shape, labels, positions, last",
    [
        ((4, 8, 5), (), (8,), True),
        ((4, 5, 8), (8,), (8,), True),
        ((4, 8, 8), (8,), (8,), True),
        ((4, 2, 8, 5), (8,), (8,), True),
        ((4, 8, 2, 5), (8,), (8,), True),
        ((4, 5, 2, 8), (8,), (8,), True),
        ((4, 8, 8, 5), (8,), (8,), True),
        ((4, 2, 9, 5), (8,), (9, 5), False),
        ((4, 3, 8, 8), (), (8, 8), False),
        ((4, 8, 8, 8), (), (8, 8), False),
        ((4, 8, 8, 3), (), (8, 8), True),
        ((4, 8, 12, 3), (), (12, 3), False),  # nothing tells
        ((4, 8, 12, 3), (16, 24), (8, 12), True),
        ((4, 8, 12, 3), (24, 6), (12, 3), False),
    ],
)
def test_layouts_follow_the_shapes(
    shape: tuple[int, ...], labels: tuple[int, ...], positions: tuple[int, ...], last: bool
) -> None:
    layout = Layout.of(TensorSpec("h", shape, "float32"), labels)
    assert (layout.positions, layout.channels_last) == (positions, last)
