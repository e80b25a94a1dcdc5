"""The held-out loss is the mean over all supervised tokens, however the rows are split."""

from __future__ import annotations

import math

import pytest
import torch

from loratune.evaluation import HeldOut, exact_match, held_out_batches, held_out_loss
from loratune.model import use_packed_attention
from tests.models import FAMILIES, PAD, exact, rows_of, tiny
from tests.oracle.loss import step_loss, supervised

ROWS = rows_of(9, 30, 6, 2, 20, 8)
CPU = torch.device("cpu")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("limit", [1, 25, 2048])
def test_against_the_oracle(packed: bool, limit: int) -> None:
    model = tiny().train()
    if packed:
        use_packed_attention(model)
    found = held_out_loss(model, held_out_batches(ROWS, packed=packed, limit=limit, pad_id=PAD), CPU)
    assert model.training
    assert (found.rows, found.supervised_tokens) == (6, supervised(ROWS))
    assert found.loss == pytest.approx(float(step_loss(exact(), ROWS)), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_padded(family: str) -> None:
    found = held_out_loss(tiny(family), held_out_batches(ROWS, packed=False, limit=50, pad_id=PAD), CPU)
    assert found.loss == pytest.approx(float(step_loss(exact(family), ROWS)), rel=1e-5)


def test_long_rows_weigh_more() -> None:
    """The mean over tokens, not the mean of the rows' means."""
    model = tiny()
    batches = held_out_batches(ROWS, packed=False, limit=1, pad_id=PAD)
    means = [held_out_loss(model, [batch], CPU).loss for batch in batches]
    assert held_out_loss(model, batches, CPU).loss != pytest.approx(sum(means) / len(means), rel=1e-3)


def test_dropout_is_off_and_nothing_is_learned() -> None:
    model = tiny("gpt2").requires_grad_(True).train()
    batches = held_out_batches(ROWS, packed=False, limit=50, pad_id=PAD)
    assert held_out_loss(model, batches, CPU) == held_out_loss(model.eval(), batches, CPU)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_every_row_is_in_one_batch() -> None:
    for packed in (True, False):
        batches = held_out_batches(ROWS, packed=packed, limit=25, pad_id=PAD)
        assert len(batches) > 1
        assert sum(batch.examples for batch in batches) == 6
        assert sum(batch.supervised for batch in batches) == supervised(ROWS)


def test_perplexity_of_a_hopeless_model_is_a_number() -> None:
    assert math.isfinite(HeldOut(1e6, 1, 1).perplexity)


def test_exact_match() -> None:
    assert exact_match(["a", " b\n", "C", ""], ["a", "b", "c", ""]) == 0.75
    with pytest.raises(ValueError, match="zip"):
        exact_match(["a"], ["a", "b"])
