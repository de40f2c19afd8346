"""The blocks of a head fit each other as well as any choice of as many does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from autodecouple.objectives.downstream import sampled
from autodecouple.passes.downstream.selection import Block, select

FORMS = st.integers(0, 2)
BLOCKS = st.lists(st.builds(Block, FORMS, FORMS), min_size=1, max_size=7)


def misfits(start: int, blocks: Sequence[Block], end: int, chosen: Sequence[int]) -> int:
    left = [start, *(blocks[i].leaves for i in chosen)]
    entered = [*(blocks[i].enters for i in chosen), end]
    return sum(a != b for a, b in zip(left, entered, strict=True))


@given(FORMS, BLOCKS, FORMS, st.data())
def test_no_choice_fits_better_and_of_such_none_is_nearer(
    start: int, blocks: list[Block], end: int, data: st.DataObject
) -> None:
    """Against all the choices there are."""
    count = data.draw(st.integers(1, len(blocks)))
    wanted = sampled(count, len(blocks))

    def cost(chosen: Sequence[int]) -> tuple[int, int]:
        distance = sum((a - b) ** 2 for a, b in zip(chosen, wanted, strict=True))
        return misfits(start, blocks, end, chosen), distance

    found = select(start, blocks, end, wanted)
    assert len(found) == count and list(found) == sorted(set(found))
    assert cost(found) == min(map(cost, itertools.combinations(range(len(blocks)), count)))


@given(st.integers(1, 40), st.data())
def test_blocks_of_one_form_are_at_equal_distances(remaining: int, data: st.DataObject) -> None:
    wanted = sampled(data.draw(st.integers(1, remaining)), remaining)
    assert select("h", [Block("h", "h")] * remaining, "h", wanted) == wanted


def test_resolution_falls_by_the_blocks_that_lower_it() -> None:
    """Three groups of four: the first block of the second and of the third lead from the first group to the output."""
    fine, middle, coarse = "16x32x32", "32x16x16", "64x8x8"
    groups = (
        [(fine, fine)] * 3 + [(fine, middle)] + [(middle, middle)] * 3 + [(middle, coarse)] + [(coarse, coarse)] * 3
    )
    blocks = [Block(*forms) for forms in groups]
    assert select(fine, blocks, coarse, sampled(2, len(blocks))) == (3, 7)
    assert select(fine, blocks, coarse, sampled(3, len(blocks)))[:2] == (3, 7)
