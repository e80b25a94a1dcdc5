"""How the rows of a step are split into micro-batches."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratune.data.batch import Batch
from loratune.data.pack import Layout, Part, batches, micro_batches, sharing, tree_micro_batches
from loratune.data.render import Rendered
from loratune.data.tree import Node, prefix_tree, subtree, tree_tokens
from loratune.loss import summed_loss
from tests.models import PAD, branching_rows, rows_of, tiny

Row = tuple[int, ...]

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), min_size=1, max_size=8)
QUICK = settings(derandomize=True, deadline=None, database=None, max_examples=300)


def tokens_of(tree: list[Node], groups: list[list[int]]) -> int:
    return sum(tree_tokens(subtree(tree, group)) for group in groups)


def all_cuts(order: list[int]) -> list[list[list[int]]]:
    """Every way to cut a list into runs."""
    found = []
    for mask in range(2 ** (len(order) - 1)):
        places = [0, *(i for i in range(1, len(order)) if mask >> (i - 1) & 1), len(order)]
        found.append([order[a:b] for a, b in pairwise(places)])
    return found


@QUICK
@given(rows=ROWS, least=st.integers(1, 4), limit=st.integers(1, 40))
def test_no_cut_of_the_tree_computes_fewer_tokens(rows: list[Row], least: int, limit: int) -> None:
    tree = prefix_tree(rows, least=least)
    groups = tree_micro_batches(tree, limit)
    assert sorted(i for group in groups for i in group) == list(range(len(rows)))
    assert all(group == sorted(group) for group in groups)
    assert all(len(group) == 1 or tree_tokens(subtree(tree, group)) <= limit for group in groups)

    def fits(cut: list[list[int]]) -> bool:
        return all(len(group) == 1 or tree_tokens(subtree(tree, group)) <= limit for group in cut)

    # Depth first: by the nodes on the way to each row.
    order = sorted(range(len(rows)), key=lambda row: [i for i, node in enumerate(tree) if row in node.rows])
    allowed = [(tokens_of(tree, cut), len(cut)) for cut in all_cuts(order) if fits(cut)]
    assert (tokens_of(tree, groups), len(groups)) == min(allowed)


def test_rows_of_one_subtree_stay_together() -> None:
    """Filled from the left, the second group would be torn apart."""
    one, two, three = (tuple(range(k, k + 20)) for k in (100, 200, 300))
    rows = [(*one, 1), (*one, 2), (*two, 1), (*two, 2), (*two, 3), (*three, 1)]
    assert tree_micro_batches(prefix_tree(rows), 44) == [[0, 1], [2, 3, 4, 5]]
    # Where it must be cut, it is cut where the least is computed again.
    assert tree_micro_batches(prefix_tree([(*one, *two, 1), (*one, *two, 2), (*one, 3)]), 42) == [[2], [0, 1]]


def test_padded_rows_of_like_length_meet() -> None:
    assert micro_batches([3, 9, 4, 8], 18, packed=False) == [[1, 3], [2, 0]]
    assert micro_batches([3, 9, 4, 8], 18, packed=True) == [[0, 1, 2], [3]]
    assert micro_batches([30, 2], 10, packed=True) == [[0], [1]]


def test_each_layout_computes_what_it_says() -> None:
    rows = branching_rows()
    whole = sum(batch.computed_tokens for batch in batches(rows, Layout.PACKED, limit=10_000, pad_id=PAD))
    padded = batches(rows, Layout.PADDED, limit=10_000, pad_id=PAD)
    (tree,) = batches(rows, Layout.TREE, limit=10_000, pad_id=PAD)
    assert sum(batch.computed_tokens for batch in padded) == whole
    assert all(batch.attention_mask is not None for batch in padded)
    assert (whole, tree.computed_tokens) == sharing([row.ids[: max_target(row.supervised)] for row in rows])
    assert tree.computed_tokens < whole
    assert tree.above is not None


def max_target(supervised: tuple[bool, ...]) -> int:
    return max(i for i, is_target in enumerate(supervised) if is_target)


# -- several processes ---------------------------------------------------------------------------------------------


def counters(found: list[Batch]) -> dict[int, int]:
    """How often each place of the step's canonical order is computed."""
    places = [int(i) for batch in found for i in batch.tokens[batch_mask(batch)].flatten()] if found else []
    return {place: places.count(place) for place in places}


def batch_mask(batch: Batch) -> Tensor:
    whole = torch.ones_like(batch.tokens, dtype=torch.bool)
    return whole if batch.attention_mask is None else batch.attention_mask


@pytest.mark.parametrize("limit", [2048, 45, 1])
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("count", [2, 3, 12])
def test_parts_are_the_whole(count: int, layout: Layout, limit: int) -> None:
    """Every target once, every token under its own place, and as many passes in each part; 12 parts have 10 rows."""
    rows = branching_rows()
    parts = [batches(rows, layout, limit=limit, pad_id=PAD, part=Part(i, count)) for i in range(count)]
    whole = batches(rows, layout, limit=limit, pad_id=PAD)
    assert len({len(part) for part in parts}) == 1
    busy = [[batch for batch in part if batch.examples] for part in parts]
    together = [batch for part in busy for batch in part]
    assert sum(batch.examples for batch in together) == len(rows)
    assert sum(batch.supervised for part in parts for batch in part) == sum(batch.supervised for batch in whole)
    assert counters(together).keys() == counters(whole).keys()
    if count > len(rows):
        assert sum(not part for part in busy) >= 2


def test_idle_passes_count_nothing() -> None:
    rows = rows_of(9, 5)
    _, (idle,) = (batches(rows[:1], Layout.PACKED, limit=99, pad_id=PAD, part=Part(i, 2)) for i in range(2))
    assert (idle.examples, idle.computed_tokens, idle.supervised) == (0, 0, 0)
    model = tiny()
    loss = summed_loss(model, idle)
    assert float(loss) == 0.0


def test_parts_have_about_as_many_tokens() -> None:
    rows = rows_of(50, 10, 10, 10, 10, 12)
    tokens = [
        sum(batch.computed_tokens for batch in batches(rows, Layout.PACKED, limit=2048, pad_id=PAD, part=Part(i, 2)))
        for i in range(2)
    ]
    assert max(tokens) - min(tokens) <= 12


def test_rows_that_begin_alike_stay_in_one_part() -> None:
    """Two groups of two: side by side in the order of a step they would be torn apart."""
    first, second = rows_of(40, 41)
    rows = [row for n in (5, 9) for row in (longer(first, n), longer(second, n))]
    for i in range(2):
        (batch,) = batches(rows, Layout.TREE, limit=2048, pad_id=PAD, part=Part(i, 2))
        assert batch.examples == 2
        assert batch.computed_tokens < 60, "what they share is computed once"


def longer(row: Rendered, by: int) -> Rendered:
    return dataclasses.replace(row, ids=row.ids + (by,) * by, supervised=row.supervised + (True,) * by)


@QUICK
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 20), st.booleans())
def test_micro_batches_hold_what_the_limit_says(lengths: list[int], limit: int, packed: bool) -> None:
    """Every row once, no group over the limit but a row alone, and none that the next row had room in."""
    groups = micro_batches(lengths, limit, packed=packed)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))

    def cost(group: list[int]) -> int:
        own = [lengths[i] for i in group]
        return sum(own) if packed else max(own) * len(own)

    assert all(cost(group) <= limit or len(group) == 1 for group in groups)
    assert all(cost([*group, then[0]]) > limit for group, then in pairwise(groups))


@pytest.mark.parametrize(("layout", "rows_each"), [(Layout.PACKED, [4]), (Layout.PADDED, [1, 3]), (Layout.TREE, [4])])
def test_a_limit_that_is_met_is_kept(layout: Layout, rows_each: list[int]) -> None:
    """One long row and three short ones with nothing in common: with pads they are twice as many tokens."""
    rows = rows_of(30, 8, 8, 8, seed=5)
    found = batches(rows, layout, limit=sum(row.needed for row in rows), pad_id=PAD)
    assert [batch.examples for batch in found] == rows_each
