"""Metrics of labels and spans, against slow definitions and cases done by hand."""

from __future__ import annotations

import random

import pytest

from loratune.evaluation.labels import accuracy, macro_f1, majority
from loratune.evaluation.spans import span_f1, spans_of


def slow_macro_f1(told: list[int], true: list[int]) -> float:
    """From precision and recall of each label."""
    scores = []
    for label in {*told, *true}:
        right = sum(a == b == label for a, b in zip(told, true, strict=True))
        precision = right / told.count(label) if label in told else 0.0
        recall = right / true.count(label) if label in true else 0.0
        scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    return sum(scores) / len(scores)


@pytest.mark.parametrize("seed", range(20))
def test_macro_f1_is_the_mean_over_labels(seed: int) -> None:
    dice = random.Random(seed)
    true = [dice.choice((0, 0, 0, 1, 2)) for _ in range(30)]
    told = [label if dice.random() < 0.6 else dice.randrange(4) for label in true]
    assert macro_f1(told, true) == pytest.approx(slow_macro_f1(told, true))


def test_a_rare_label_that_is_never_told_costs_half() -> None:
    true, told = [0] * 9 + [1], [0] * 10
    assert accuracy(told, true) == majority(true) == 0.9
    assert macro_f1(told, true) == pytest.approx((18 / 19) / 2)


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("B-a I-a O B-a", {("a", 0, 2), ("a", 3, 4)}),
        ("B-a B-a I-b", {("a", 0, 1), ("a", 1, 2), ("b", 2, 3)}),
        ("O I-a I-a", {("a", 1, 3)}),
        ("noun noun verb O", {("noun", 0, 2), ("verb", 2, 3)}),
        ("B-a-b I-a-b", {("a-b", 0, 2)}),
        ("O O", set()),
    ],
)
def test_spans(tags: str, spans: set[tuple[str, int, int]]) -> None:
    assert spans_of(tags.split()) == spans


def test_span_counts_only_whole_and_where_it_stands() -> None:
    true = [["B-a", "I-a", "O"], ["O", "B-b", "O"]]
    told = [["B-a", "O", "O"], ["O", "B-b", "O"]]
    assert span_f1(told, true) == pytest.approx(0.5)
    # The same words in other rows are other spans.
    assert span_f1(told[::-1], true) == 0.0
    assert span_f1([["O"]], [["O"]]) == 1.0
