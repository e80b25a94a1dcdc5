"""The objective as a formula: row by row, every token, float64, one logit vector at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loratune.data.render import Rendered


def row_loss(model: Any, row: Rendered) -> Tensor:
    """Σ −log p(token | what stands before it) over a row's supervised tokens, the whole row alone in the model."""
    logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].double()
    total = torch.zeros((), dtype=torch.float64)
    for i, supervised in enumerate(row.supervised):
        if supervised:
            scores = logits[i - 1]
            total = total + torch.logsumexp(scores, 0) - scores[row.ids[i]]
    return total


def step_loss(model: Any, rows: Sequence[Rendered]) -> Tensor:
    """A step's loss: the sum over its supervised tokens, divided by their number."""
    return sum((row_loss(model, row) for row in rows), torch.zeros((), dtype=torch.float64)) / supervised(rows)


def supervised(rows: Sequence[Rendered]) -> int:
    return sum(sum(row.supervised) for row in rows)
