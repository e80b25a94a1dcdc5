"""Rows as tensors: every supervised token is scored where it is predicted, and counted for each of its rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from loratune.data.batch import Batch, computed, make_batch, tree_of
from loratune.data.pack import Layout, batches
from loratune.data.render import Rendered
from tests.models import PAD, branching_rows, rows_of

ROWS = branching_rows()


def expected(rows: list[Rendered]) -> Counter[tuple[tuple[int, ...], int]]:
    """Each supervised token with all that comes before it."""
    return Counter(
        (row.ids[:i], token)
        for row in rows
        for i, (token, supervised) in enumerate(zip(row.ids, row.supervised, strict=True))
        if supervised
    )


def spelled(batch: Batch) -> list[tuple[int, ...] | None]:
    """The tokens that each place of a batch has before and at it; None at pads."""
    ids = batch.input_ids.tolist()
    if batch.segments is None:
        assert batch.attention_mask is not None
        mask = batch.attention_mask.tolist()
        rows = zip(ids, mask, strict=True)
        return [tuple(row[: i + 1]) if real[i] else None for row, real in rows for i in range(len(row))]
    found: list[tuple[int, ...] | None] = []
    begins: list[tuple[int, ...]] = []
    whole: list[tuple[int, ...]] = []
    place = 0
    for number, length in enumerate(batch.segments):
        path = batch.above[number] if batch.above else ()
        begins.append(tuple(token for i in path for token in whole[i]))
        whole.append(tuple(ids[0][place : place + length]))
        found += [begins[-1] + whole[-1][: i + 1] for i in range(length)]
        place += length
    return found


def scored(batch: Batch) -> Counter[tuple[tuple[int, ...], int]]:
    before = spelled(batch)
    times = [1] * len(batch.targets) if batch.times is None else batch.times.int().tolist()
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    for place, target, count in zip(batch.scored.tolist(), batch.targets.tolist(), times, strict=True):
        prefix = before[place]
        assert prefix is not None, "a pad is scored"
        found[prefix, target] += count
    return found


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("limit", [1, 70, 10_000])
def test_every_supervised_token_is_scored_after_its_prefix(layout: Layout, limit: int) -> None:
    """Shared ones as often as rows have them; positions are the places in the rows; counters are each token's own."""
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    counters: dict[tuple[int, ...], set[int]] = {}
    for batch in batches(ROWS, layout, limit=limit, pad_id=PAD):
        found += scored(batch)
        positions, numbers = batch.position_ids.flatten().tolist(), batch.tokens.flatten().tolist()
        for prefix, position, number in zip(spelled(batch), positions, numbers, strict=True):
            if prefix is not None:
                assert position == len(prefix) - 1
                counters.setdefault(prefix, set()).add(number)
    assert found == expected(ROWS)
    everywhere = [number for numbers in counters.values() for number in numbers]
    assert len(everywhere) == len(set(everywhere)), "one mask for two tokens"


def test_counters_do_not_depend_on_the_split() -> None:
    def numbers(limit: int) -> dict[tuple[int, ...], set[int]]:
        found: dict[tuple[int, ...], set[int]] = {}
        for batch in batches(ROWS, Layout.TREE, limit=limit, pad_id=PAD):
            for prefix, number in zip(spelled(batch), batch.tokens.flatten().tolist(), strict=True):
                assert prefix is not None
                found.setdefault(prefix, set()).add(number)
        return found

    # Prefixes shorter than a node are repeated, so one may have several numbers; which ones is the step's alone.
    assert numbers(1) == numbers(70) == numbers(10_000)


def test_what_follows_the_last_target_is_not_computed() -> None:
    (row,) = rows_of(9)
    cut = replace(row, supervised=(False, True, False, True, False, False, False, False, False))
    assert cut.needed == 3
    assert computed(cut) == row.ids[:3]


def test_a_target_with_a_large_id() -> None:
    """Position and target are one number for a while."""
    (row,) = rows_of(40)
    large = replace(row, ids=(*row.ids[:39], 2**31 + 5), supervised=(False,) * 38 + (True, True))
    other = replace(large, ids=(*row.ids[:39], 7))
    batch = make_batch([large, other, large], packed=True, pad_id=PAD, tree=tree_of([large, other, large]))
    assert batch.targets.tolist() == [row.ids[38], 7, 2**31 + 5]
    assert batch.times is not None
    assert batch.times.tolist() == [3.0, 1.0, 2.0]
