"""What is chosen among, and what it costs, for each kind of batch, with models whose outputs are written down."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loratune.data.batch import Batch
from loratune.data.labelled import LabelBatch
from loratune.data.located import LocatedBatch
from loratune.data.matched import MatchBatch
from loratune.data.translated import TranslatedBatch
from loratune.loss import Objective, logits_of, summed_loss, vectors_of

# Two rows, the second with one pad.
MASK = torch.tensor([[True, True, True], [True, True, False]])


def batch_of(kind: type[Batch], **own: Any) -> Any:
    """A padded batch of this kind; targets and what is scored are its own."""
    common: dict[str, Any] = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]),
        "position_ids": torch.arange(3).expand(2, 3),
        "segments": None,
        "attention_mask": MASK,
        "tokens": torch.arange(6).view(2, 3),
        "examples": 2,
        "computed_tokens": 5,
    }
    return kind(**{**common, **own})


class Said(nn.Module):
    """Gives what it is told to, and keeps what it is given."""

    def __init__(self, **output: Any) -> None:
        super().__init__()
        self.output = SimpleNamespace(**output)
        self.given: dict[str, Any] = {}

    def forward(self, **given: Any) -> Any:
        self.given = given
        return self.output


def lost(logits: Tensor, targets: Tensor) -> float:
    return -float(logits.double().log_softmax(-1).gather(1, targets[:, None]).sum())


@pytest.mark.parametrize("types", [None, torch.tensor([[0, 1, 1], [0, 1, 0]])])
def test_labels_of_rows(types: Tensor | None) -> None:
    logits = torch.randn(2, 4)
    model = Said(logits=logits)
    targets = torch.tensor([3, 1])
    batch = batch_of(LabelBatch, scored=torch.tensor([0, 1]), targets=targets, types=types)
    assert torch.equal(logits_of(model, batch), logits)
    expected = {"input_ids": batch.input_ids, "attention_mask": MASK}
    assert model.given.keys() == (expected if types is None else {**expected, "token_type_ids": types}).keys()
    assert model.given["input_ids"] is batch.input_ids
    assert model.given["attention_mask"] is MASK
    assert types is None or model.given["token_type_ids"] is types
    assert float(summed_loss(model, batch)) == pytest.approx(lost(logits, targets), rel=1e-6)


def test_labels_of_tokens_are_those_scored() -> None:
    logits = torch.randn(2, 3, 4)
    batch = batch_of(LabelBatch, scored=torch.tensor([1, 3, 4]), targets=torch.tensor([0, 1, 2]))
    assert torch.equal(logits_of(Said(logits=logits), batch), logits.view(6, 4)[[1, 3, 4]])


def test_a_target_counts_as_often_as_it_is_said() -> None:
    logits = torch.randn(2, 4)
    targets = torch.tensor([3, 1])
    batch = batch_of(LabelBatch, scored=torch.tensor([0, 1]), targets=targets)
    twice = replace(batch, times=torch.tensor([2.0, 0.0]))
    assert float(summed_loss(Said(logits=logits), twice)) == pytest.approx(2 * lost(logits[:1], targets[:1]), rel=1e-6)


def test_an_answer_stands_in_no_pad() -> None:
    start, end = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 60.0]]), torch.tensor([[7.0, 8.0, 9.0], [1.0, 0.0, 90.0]])
    batch = batch_of(LocatedBatch, scored=torch.arange(4), targets=torch.tensor([0, 2, 1, 0]))
    found = logits_of(Said(start_logits=start, end_logits=end), batch)
    # Of each row where it begins and where it ends; a pad is far below the likeliest of the others.
    assert found.tolist() == [[1.0, 2.0, 3.0], [7.0, 8.0, 9.0], [4.0, 5.0, 5.0 - 30], [1.0, 0.0, 1.0 - 30]]


class Hidden(nn.Module):
    """Hidden states by token: the number of each id, and of what it was called with."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, 4).to(dtype))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        assert input_ids.shape == attention_mask.shape
        self.seen.append(tuple(input_ids.shape))
        return (self.table[input_ids],)


def pairs(**own: Any) -> Any:
    return batch_of(MatchBatch, scored=torch.arange(1), targets=torch.zeros(1, dtype=torch.int64), **own)


def test_vectors_are_means_of_tokens_that_are_there() -> None:
    model = Hidden()
    found = vectors_of(model, pairs())
    means = torch.stack([model.table[[5, 6, 7]].mean(0), model.table[[8, 9]].mean(0)])
    torch.testing.assert_close(found, nn.functional.normalize(means, dim=-1))
    assert model.seen == [(2, 3)]
    assert vectors_of(Hidden(torch.bfloat16), pairs()).dtype == torch.float32


@pytest.mark.parametrize(
    ("at_once", "seen"), [(0, [(2, 3)]), (6, [(2, 3)]), (5, [(1, 3), (1, 2)]), (1, [(1, 3), (1, 2)])]
)
def test_few_texts_at_a_time(at_once: int, seen: list[tuple[int, ...]]) -> None:
    """The same vectors and gradients; the second text alone has no pad."""
    model = Hidden()
    whole = vectors_of(model, pairs())
    (right,) = torch.autograd.grad(whole.sum(), model.table)
    model.seen.clear()
    some = vectors_of(model, pairs(at_once=at_once))
    assert model.seen == seen
    torch.testing.assert_close(some, whole)
    torch.testing.assert_close(torch.autograd.grad(some.sum(), model.table)[0], right)
    with torch.no_grad():
        torch.testing.assert_close(vectors_of(model, pairs(at_once=at_once)), whole)


def test_a_texts_own_answer_against_the_others() -> None:
    model = Hidden()
    ids = torch.tensor([[1, 2, 3], [4, 5, 0], [6, 7, 8], [2, 9, 0]])
    mask = torch.tensor([[True] * 3, [True, True, False]] * 2)
    same = torch.tensor([[False, False], [True, False]])
    batch = batch_of(
        MatchBatch, input_ids=ids, attention_mask=mask, tokens=torch.arange(12).view(4, 3), same=same,
        scored=torch.arange(2), targets=torch.arange(2),
    )  # fmt: skip
    vectors = vectors_of(model, batch)
    cosines = vectors[:2] @ vectors[2:].T
    found = logits_of(model, batch)
    torch.testing.assert_close(found, (cosines / 0.05).masked_fill(same, -1e4))
    assert float(summed_loss(model, batch)) == pytest.approx(lost(found, batch.targets), rel=1e-5)


LABELS = torch.tensor([[5, 6, 2], [7, 2, -100]])


def test_a_decoder_is_given_what_comes_before() -> None:
    logits = torch.randn(2, 3, 10)
    model = Said(logits=logits)
    model.config = SimpleNamespace(decoder_start_token_id=1, pad_token_id=0)
    batch = batch_of(TranslatedBatch, labels=LABELS, scored=torch.tensor([0, 1, 2, 3, 4]), targets=LABELS[LABELS >= 0])
    assert torch.equal(logits_of(model, batch), logits.view(6, 10)[:5])
    assert model.given.pop("decoder_input_ids").tolist() == [[1, 5, 6], [1, 7, 2]]
    assert model.given.pop("use_cache") is False
    assert model.given.keys() == {"input_ids", "attention_mask"}
    assert float(summed_loss(model, batch)) == pytest.approx(lost(logits.view(6, 10)[:5], batch.targets), rel=1e-6)


def test_a_pad_before_something_is_the_familys_pad() -> None:
    model = Said(logits=torch.randn(1, 3, 10))
    model.config = SimpleNamespace(decoder_start_token_id=1, pad_token_id=0)
    labels = torch.tensor([[-100, 4, 2]])
    logits_of(model, batch_of(TranslatedBatch, labels=labels, scored=torch.tensor([1]), targets=torch.tensor([4])))
    assert model.given["decoder_input_ids"].tolist() == [[1, 0, 4]]


def test_a_familys_own_way_to_begin() -> None:
    model: Any = Said(logits=torch.randn(2, 3, 10))
    model.prepare_decoder_input_ids_from_labels = lambda labels: labels + 200
    logits_of(model, batch_of(TranslatedBatch, labels=LABELS, scored=torch.tensor([0]), targets=torch.tensor([5])))
    assert torch.equal(model.given["decoder_input_ids"], LABELS + 200)


def test_an_objective_is_its_models_loss() -> None:
    model = Said(logits=torch.zeros(2, 4))
    batch = batch_of(LabelBatch, scored=torch.tensor([0, 1]), targets=torch.tensor([3, 1]))
    objective = Objective(model)
    assert objective.model is model
    assert float(summed_loss(objective, batch)) == pytest.approx(2 * math.log(4))
