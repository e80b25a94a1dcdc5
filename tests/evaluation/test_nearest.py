"""Which text is nearest: a model that tells nothing apart finds nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loratune.data.matched import MATCHED, render_matched
from loratune.data.read import read
from loratune.evaluation import tasks
from tests.models import encoder
from tests.tiny import tiny_tokenizer

WORDS = ("fine", "lazy", "Paris", "stop", "Hello")


def measured(monkeypatch: pytest.MonkeyPatch, vectors: Tensor, seconds: tuple[str, ...] = WORDS) -> dict[str, float]:
    """Of the vectors that a model gives the first texts, then the second ones."""
    rows = [{"anchor": f"the {first}", "positive": second} for first, second in zip(WORDS, seconds, strict=True)]
    rendered = render_matched(read(rows, shapes=MATCHED).examples, tiny_tokenizer(None), max_length=64).rows
    monkeypatch.setattr(tasks, "vectors_of", lambda *_: vectors)
    asking: Any = tasks.Asking(torch.device("cpu"), 2, 999, (), str)
    return tasks._ranks(tasks._nearest(encoder(), rendered, asking), rendered, ())


def test_each_finds_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(monkeypatch, torch.eye(5).repeat(2, 1)) == {"recall_at_1": 1.0, "mrr": 1.0}


@pytest.mark.parametrize("vector", [1.0, torch.nan])
def test_all_are_the_same_to_it(vector: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(monkeypatch, torch.full((10, 3), vector)) == {"recall_at_1": 0.0, "mrr": pytest.approx(1 / 5)}


def test_equal_texts_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.eye(5).repeat(2, 1)
    vectors[6] = vectors[5]
    found = measured(monkeypatch, torch.cat([vectors[:1], vectors[:1], vectors[2:]]), ("stop", "stop", *WORDS[2:]))
    assert found == {"recall_at_1": 1.0, "mrr": 1.0}
