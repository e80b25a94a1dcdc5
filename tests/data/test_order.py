"""Which rows make a step: each row once an epoch, from the seed alone, and groups that meet but never fill a step."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.data.order import Order, bundle_size, groups_of
from loratune.data.pack import sharing

Row = tuple[int, ...]

QUICK = settings(derandomize=True, deadline=None, database=None, max_examples=150)


def nested(count: int, seed: int) -> list[Row]:
    """Some of few beginnings, after which some of few continuations: groups of every size, and rows of no group."""
    dice = random.Random(seed)
    kinds = dice.randint(1, 12)

    def row() -> Row:
        first, second = dice.randrange(kinds), dice.randrange(3)
        return (first,) * 20 * (first > 0) + (second,) * 20 * (second > 0) + (9, dice.randrange(5))

    return [row() for _ in range(count)]


ROWS = st.builds(nested, st.integers(1, 80), st.integers(0, 10_000))


def documents(count: int, questions: int, *, seed: int = 0, length: int = 80, own: int = 20) -> list[Row]:
    """Questions about documents, mixed: row i is about document i % count before mixing."""
    dice = random.Random(seed)
    heads = [tuple(dice.randrange(1000) for _ in range(length)) for _ in range(count)]
    rows = [heads[i % count] + tuple(dice.randrange(1000) for _ in range(own)) for i in range(count * questions)]
    dice.shuffle(rows)
    return rows


def epoch_of(order: Order, epoch: int = 0) -> list[tuple[int, ...]]:
    first = epoch * order.steps_per_epoch
    return [order.step(first + i) for i in range(order.steps_per_epoch)]


def computed(rows: list[Row], order: Order, epochs: int = 3) -> int:
    return sum(sharing([rows[i] for i in step])[1] for epoch in range(epochs) for step in epoch_of(order, epoch))


@QUICK
@given(rows=ROWS, batch_size=st.integers(1, 20), seed=st.integers(0, 5), grouped=st.booleans())
def test_each_row_once_an_epoch(rows: list[Row], batch_size: int, seed: int, grouped: bool) -> None:
    order = Order(len(rows), batch_size, seed, groups_of(rows) if grouped else None)
    for epoch in range(3):
        steps = epoch_of(order, epoch)
        assert sorted(i for step in steps for i in step) == list(range(len(rows)))
        assert all(len(step) == batch_size for step in steps[:-1])
        assert 0 < len(steps[-1]) <= batch_size


@QUICK
@given(
    count=st.integers(1, 12),
    questions=st.integers(1, 9),
    batch_size=st.sampled_from([4, 6, 8, 16]),
    seed=st.integers(0, 9),
)
def test_from_the_seed_and_the_step_alone(count: int, questions: int, batch_size: int, seed: int) -> None:
    rows = documents(count, questions)
    one, other = (Order(len(rows), batch_size, seed, groups_of(rows)) for _ in range(2))
    forwards = [step for epoch in range(3) for step in epoch_of(one, epoch)]
    backwards = [other.step(number) for number in reversed(range(3 * other.steps_per_epoch))]
    assert forwards == backwards[::-1]


@pytest.mark.parametrize("batch_size", [4, 8, 16, 32])
def test_epochs_and_seeds_differ(batch_size: int) -> None:
    """Not only the order of the bundles: who stands in a bundle with whom."""
    rows = documents(16, 10)
    groups = groups_of(rows)

    def together(order: Order, epoch: int) -> set[tuple[int, int]]:
        steps = epoch_of(order, epoch)
        return {(a, b) for step in steps for a in step for b in step if a < b and rows[a][:80] == rows[b][:80]}

    one, other = Order(len(rows), batch_size, 0, groups), Order(len(rows), batch_size, 1, groups)
    drawn = [together(one, 0), together(one, 1), together(other, 0)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert len(drawn[first] & drawn[second]) < 0.8 * len(drawn[first])


@pytest.mark.parametrize(("batch_size", "least"), [(4, 2), (5, 2), (8, 2), (12, 3), (16, 4), (32, 4), (64, 8)])
def test_a_step_mixes_several_bundles(batch_size: int, least: int) -> None:
    """So that no step is about one document, if there are more of them than a step has bundles."""
    assert batch_size // bundle_size(batch_size) >= least
    rows = documents(100, 16)
    order = Order(len(rows), batch_size, 3, groups_of(rows))
    mixed = [len({rows[i][:80] for i in step}) for epoch in range(3) for step in epoch_of(order, epoch)[:-1]]
    # By chance two bundles of a step may be about the same document.
    assert sum(mixed) / len(mixed) > 0.9 * least
    assert sum(count == 1 for count in mixed) < 0.05 * len(mixed)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_small_steps_have_no_room_for_groups(batch_size: int) -> None:
    assert bundle_size(batch_size) == 1


@pytest.mark.parametrize("batch_size", range(1, 65))
def test_a_bundle_is_at_most_half_a_step(batch_size: int) -> None:
    assert 1 <= bundle_size(batch_size) <= max(1, batch_size // 2)


@QUICK
@given(
    count=st.integers(2, 20),
    questions=st.integers(2, 12),
    batch_size=st.sampled_from([4, 8, 16]),
    seed=st.integers(0, 9),
    length=st.sampled_from([30, 80]),
)
def test_never_more_tokens_than_in_random_order(
    count: int, questions: int, batch_size: int, seed: int, length: int
) -> None:
    rows = documents(count, questions, seed=seed, length=length)
    grouped = computed(rows, Order(len(rows), batch_size, seed, groups_of(rows)), epochs=8)
    at_random = computed(rows, Order(len(rows), batch_size, seed), epochs=8)
    # The set is one step or two: there is hardly anything to choose, and chance may be kinder.
    assert grouped <= at_random * (1.0 if len(rows) > 4 * batch_size else 1.05)


def test_it_saves_what_bundles_can() -> None:
    """Bundles of four have three of four prefixes less: of 100 tokens 80 are shared."""
    rows = documents(50, 8)
    order = Order(len(rows), 8, 0, groups_of(rows))
    whole = sum(map(len, rows))
    assert computed(rows, order, epochs=1) <= whole * (0.2 + 0.8 / 4) * 1.001


def test_no_bundle_is_cut_where_another_one_fits() -> None:
    """Groups of three do not tile steps of eight; single rows fill what is left."""
    rows = [*documents(20, 3), *documents(40, 1, seed=1)]
    order = Order(len(rows), 8, 0, groups_of(rows))
    steps = {i: number for number, step in enumerate(epoch_of(order)) for i in step}
    torn = {rows[i][:80] for i in range(60) for j in range(60) if rows[i][:80] == rows[j][:80] and steps[i] != steps[j]}
    assert not torn


def test_inner_groups_come_first() -> None:
    """Rows with a document in common, under tools in common, under one system prompt."""
    dice = random.Random(0)

    def some(count: int) -> Row:
        return tuple(dice.randrange(1000) for _ in range(count))

    system = some(40)
    rows = []
    for _ in range(5):
        tools = system + some(40)
        for _ in range(5):
            document = tools + some(40)
            rows += [document + some(10) for _ in range(5)]
    dice.shuffle(rows)
    order = Order(len(rows), 8, 0, groups_of(rows))
    steps = epoch_of(order)
    # Four of each five rows stand in a bundle of their own document; the fifth meets others with the same tools. 125
    # rows have one too many for bundles of four in steps of eight, so that one bundle may be cut.
    together = Counter((number, rows[i][:120]) for number, step in enumerate(steps) for i in step)
    assert sum(count >= 4 for count in together.values()) >= 24
    left = Counter((number, document[:80]) for (number, document), count in together.items() if count % 4 == 1)
    assert sum(count for count in left.values() if count > 1) >= 16


def test_a_prefix_of_all_rows_makes_no_difference() -> None:
    """Every order shares it: what follows it decides who meets."""
    rows = documents(40, 5, length=30, own=20)
    under = [tuple(range(2000, 2400)) + row for row in rows]
    assert len(groups_of(under).rows) == len(groups_of(rows).rows) + 1 == 41
    grouped, at_random = Order(200, 8, 0, groups_of(under)), Order(200, 8, 0)
    assert computed(under, grouped) < 0.95 * computed(under, at_random)


def test_chance_beginnings_make_no_group() -> None:
    """A handful of tokens in common, as of questions that begin with the same word."""
    dice = random.Random(0)
    rows = [(i % 3, 5, 6, *(dice.randrange(1000) for _ in range(50))) for i in range(60)]
    assert groups_of(rows).rows == ()
    assert groups_of(rows).loose == tuple(range(60))


def test_the_same_in_every_process() -> None:
    code = (
        "from tests.data.test_order import *; rows = documents(9, 7); "
        "order = Order(len(rows), 8, 4, groups_of(rows)); print([order.step(i) for i in range(20)])"
    )
    shown = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(path for path in sys.path if path)},
        ).stdout
        for seed in ("1", "2")
    }
    rows = documents(9, 7)
    order = Order(len(rows), 8, 4, groups_of(rows))
    assert shown == {f"{[order.step(i) for i in range(20)]}\n"}
