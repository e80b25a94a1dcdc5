"""Cross-entropy over the supervised tokens, as a sum: dividing by a step's count is the caller's.

Only the positions that predict a supervised token get logits, and these are turned into fp32 a chunk at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loratune.data.batch import Batch
from loratune.model import only_positions, packed_inputs

_CHUNK = 256


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (N, vocabulary) at the batch's scored positions, in the model's dtype."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    if batch.segments is not None:
        inputs.update(packed_inputs(batch.segments, batch.above))
    else:
        inputs.update(attention_mask=batch.attention_mask, use_cache=False)
    with only_positions(model, batch.scored):
        logits: Tensor = model(**inputs).logits
    return logits[0]


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Σ −log p(target) over the batch's supervised tokens, an fp32 scalar with a graph where gradients are on."""
    return cross_entropy(logits_of(model, batch), batch.targets, batch.times)


def cross_entropy(logits: Tensor, targets: Tensor, times: Tensor | None = None) -> Tensor:
    """Σ −times · log softmax(logits)[target] in fp32.

    Args:
        logits: (N, vocabulary) of any float dtype; targets: (N,).
        times: (N,), how often each counts; once without it.
    """
    total = torch.zeros((), device=logits.device)
    for begin in range(0, len(targets), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        often = None if times is None else times[part]
        # Recomputed in the backward pass: an fp32 copy of all logits would be the largest tensor of the step.
        total = total + checkpoint(_chunk_loss, logits[part], targets[part], often, use_reentrant=False)
    return total


def _chunk_loss(logits: Tensor, targets: Tensor, times: Tensor | None) -> Tensor:
    if times is None:
        return F.cross_entropy(logits.float(), targets, reduction="sum")
    return (F.cross_entropy(logits.float(), targets, reduction="none") * times).sum()
