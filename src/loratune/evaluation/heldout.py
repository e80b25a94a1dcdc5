"""Held-out loss: the same objective as in training, on rows that no step has seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from loratune.data.batch import Batch
from loratune.data.pack import Layout, batches
from loratune.data.render import Rendered
from loratune.loss import summed_loss
from loratune.model import evaluating


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Mean loss over the supervised tokens, in nats, and how many there were."""

    loss: float
    supervised_tokens: int
    rows: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def _alone(*sums: float) -> Sequence[float]:
    return sums


def held_out_batches(rows: Sequence[Rendered], *, packed: bool, limit: int, pad_id: int) -> list[Batch]:
    """The rows as micro-batches of at most `limit` tokens."""
    return batches(rows, Layout.PACKED if packed else Layout.PADDED, limit=limit, pad_id=pad_id)


@torch.no_grad()
def held_out_loss(
    model: nn.Module, batches: Sequence[Batch], device: torch.device, *, summed: Callable[..., Sequence[float]] = _alone
) -> HeldOut:
    """Mean loss over the supervised tokens of all batches, in evaluation mode.

    Args:
        summed: what several processes that each have a part of the batches make of their sums: those over all.
    """
    with evaluating(model):
        total = sum(float(summed_loss(model, batch.to(device))) for batch in batches)
    count, rows = (sum(numbers) for numbers in zip(*((b.supervised, b.examples) for b in batches), strict=True))
    total, count, rows = summed(total, count, rows)
    return HeldOut(total / count, round(count), round(rows))
