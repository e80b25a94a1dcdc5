"""Answers found in a context, against all spans tried one by one, and against what SQuAD's script makes of texts."""

from __future__ import annotations

import random
import string
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from loratune.data.located import LOCATED, Located, render_located
from loratune.data.read import read
from loratune.evaluation import MEASURES, tasks
from loratune.evaluation.located import of_best, same_words, word_f1
from tests.models import encoder
from tests.tiny import tiny_tokenizer

WORDS = ("the", "a", "An", "Paris", "paris!", "is", "twenty-one", "21", "…", "%", "naïve", "thesis")


def slow(told: str, true: str) -> tuple[float, float]:
    """Exact match and F1 from precision and recall, step by step."""

    def tokens(text: str) -> list[str]:
        kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
        return [word for word in kept.split() if word not in ("a", "an", "the")]

    a, b = tokens(told), tokens(true)
    if not a or not b:
        return float(a == b), float(a == b)
    common = sum(min(a.count(word), b.count(word)) for word in set(a))
    precision, recall = common / len(a), common / len(b)
    return float(a == b), 2 * precision * recall / (precision + recall) if common else 0.0


@pytest.mark.parametrize("seed", range(30))
def test_words_are_compared_as_squad_compares_them(seed: int) -> None:
    dice = random.Random(seed)
    told, true = (" ".join(dice.choices(WORDS, k=dice.randrange(5))) for _ in range(2))
    assert (same_words(told, true), word_f1(told, true)) == pytest.approx(slow(told, true))


@pytest.mark.parametrize(
    ("told", "true", "exact", "f1"),
    [
        ("The Paris.", "paris", 1.0, 1.0),
        ("Paris, France", "Paris", 0.0, 2 / 3),
        ("a thesis", "the thesis", 1.0, 1.0),
        ("", "Paris", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("Paris Paris", "Paris", 0.0, 2 / 3),
        ("twenty one", "twenty-one", 0.0, 0.0),
    ],
)
def test_by_hand(told: str, true: str, exact: float, f1: float) -> None:
    assert (same_words(told, true), word_f1(told, true)) == pytest.approx((exact, f1))


def test_the_nearest_of_several_counts_and_nothing_where_none_is_right() -> None:
    told, right = ["Paris", "", "Rome"], [("Lyon", "Paris"), (), ()]
    assert of_best(same_words, told, right) == pytest.approx(2 / 3)
    # An answer without a word is none where another has one, as in SQuAD 2.
    assert of_best(same_words, ["", ""], [("Paris", "%"), ("%",)]) == 0.5


def rows_of(contexts: list[str], answers: list[str | None], *, length: int = 24) -> list[Any]:
    rows = [
        {"question": "a", "context": text, "answer": answer, "answer_start": text.index(answer) if answer else None}
        for text, answer in zip(contexts, answers, strict=True)
    ]
    examples = read(rows, shapes=LOCATED).examples
    return list(render_located(examples, tiny_tokenizer(None), max_length=length).rows)


def told_by(monkeypatch: pytest.MonkeyPatch, rows: list[Any], ends: dict[int, Tensor]) -> list[tasks.Said]:
    """What is said of windows whose logits are these."""

    def logits_of(_: Any, batch: Any) -> Tensor:
        found = []
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            own = tuple(ids[mask].tolist())
            number = next(i for i, row in enumerate(rows) if row.ids == own and i not in seen)
            seen.add(number)
            pads = torch.full((2, len(ids) - len(own)), -30.0)
            found.append(torch.cat([ends[number], pads], 1))
        return torch.cat(found)

    seen: set[int] = set()
    monkeypatch.setattr(tasks, "logits_of", logits_of)
    asking: Any = tasks.Asking(torch.device("cpu"), 2, 60, (), str)
    return MEASURES["QUESTION_ANS"].ask(encoder(), rows, asking)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("silent", [False, True])
def test_best_span_of_all_windows(seed: int, silent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dice, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    contexts = [" ".join(dice.choices(("Paris", "is", "café", "21"), k=(3, 30)[n % 2])) for n in range(6)]
    answers = [text.split()[0] for text in contexts]
    rows = rows_of(contexts, [*answers[:-1], None if silent else answers[-1]])
    ends = {number: torch.randn(2, len(row.ids), generator=noise) * 3 for number, row in enumerate(rows)}
    said = told_by(monkeypatch, rows, ends)
    assert any(row.window for row in rows)
    for place in {row.place for row in rows}:
        mine = [number for number, row in enumerate(rows) if row.place == place]
        spans = {
            (number, first, last): float(ends[number][0, first] + ends[number][1, last])
            for number in mine
            for first in range(len(rows[number].ids))
            for last in range(first, len(rows[number].ids))
            if rows[number].places[first] and rows[number].places[last]
        }
        best = max(spans, key=spans.__getitem__)
        nothing = min(float(ends[number][:, 0].sum()) for number in mine)
        for number in mine:
            text = tasks._span(said[number], rows)
            assert text == ("" if silent and nothing > spans[best] else rows[best[0]].said(*best[1:]))


def sure(row: Located) -> Tensor:
    """Logits of a model that knows."""
    ends = torch.zeros(2, len(row.ids))
    for end, target in enumerate(row.targets):
        ends[end, target] = 9.0 if row.targets[0] != row.nowhere or not row.answers else 1.0
    return ends


def test_who_knows_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = ["Paris is the capital", "The weather in Berlin is 21 degrees. " * 3 + "good", "Hello there"]
    rows = rows_of(contexts, ["Paris", "good", None])
    said = told_by(monkeypatch, rows, {number: sure(row) for number, row in enumerate(rows)})
    found = MEASURES["QUESTION_ANS"].score(said, rows, ())
    assert Counter(row.place.row for row in rows)[2] > 1
    assert (found["f1"], found["exact_match"]) == (1.0, 1.0)
    # Nothing said is right in one of three rows; all said has a part of two of them.
    assert found["trivial_f1"] == pytest.approx(max(1 / 3, (2 * 1 / 4 + 2 * 1 / 20) / 3))


def test_nothing_is_no_answer_where_all_rows_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(["Paris is", "Berlin is"], ["Paris", "Berlin"])
    ends = {number: torch.zeros(2, len(row.ids)) for number, row in enumerate(rows)}
    for one in ends.values():
        one[:, 0] = 9.0
    assert all(tasks._span(one, rows) for one in told_by(monkeypatch, rows, ends))
    rows = rows_of(["Paris is", "Berlin is"], ["Paris", None])
    assert [tasks._span(one, rows) for one in told_by(monkeypatch, rows, ends)] == ["", ""]
