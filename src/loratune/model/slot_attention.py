"""Attention of one new token a row to what its row has seen, where keys and values stand in slots of one length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SlotStep:
    """One step of several rows.

    Attributes:
        lengths: (rows,), how many tokens each row has, the new one included.
        seen: (rows, 1, 1, longest), which places of its slot hold them.
    """

    lengths: Tensor
    seen: Tensor

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> SlotStep:
        counts = torch.tensor(lengths, device=device)
        places = torch.arange(max(lengths), device=device)
        return cls(counts, (places < counts[:, None])[:, None, None])


def slot_attention(
    query: Tensor, key: Tensor, value: Tensor, step: SlotStep, window: int | None, scale: float | None
) -> Tensor:
    """softmax(s q K) V over what each row has seen, in fp32 where it sums.

    Args:
        query: (rows, heads, 1, dim); key and value: (rows, kv heads, longest, dim), views of the slots.
        window: how many of its last tokens a row sees; all without it.

    Returns:
        (rows, 1, heads, dim).
    """
    rows, heads, _, dim = query.shape
    grouped = query.view(rows, key.shape[1], -1, dim)  # the queries of a key head stand together: nothing is repeated
    seen = step.seen
    if window is not None and key.shape[2] > window:
        places = torch.arange(key.shape[2], device=query.device)
        seen = seen & (places >= (step.lengths - window)[:, None])[:, None, None]
    # Keys first: with them second the product would copy all of them, since a slot is longer than what is seen of it.
    scores = (key @ grouped.mT).mT.float() * (dim**-0.5 if scale is None else scale)
    p = scores.masked_fill_(~seen, float("-inf")).softmax(-1).to(value.dtype)
    return (p @ value).view(rows, 1, heads, dim)
