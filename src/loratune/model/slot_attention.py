"""Attention of one new token a row to what its row has seen, where keys and values stand in slots of one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Held(Protocol):
    """Where keys and values stand."""

    def of_rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, kv heads, longest, dim) of the layer whose new ones came in last: views."""
        ...


@dataclass(frozen=True, slots=True)
class SlotStep:
    """One step of several rows, whose tokens stand before all others in a packed row.

    Attributes:
        lengths: (rows,), how many tokens each row has, the new one included.
        seen: (rows, 1, 1, longest), which places of its slot hold them.
        held: their keys and values, in which those of the new tokens stand already.
    """

    lengths: Tensor
    seen: Tensor
    held: Held

    @classmethod
    def of(cls, lengths: Sequence[int], held: Held, device: torch.device) -> SlotStep:
        counts = torch.tensor(lengths, device=device)
        places = torch.arange(max(lengths), device=device)
        return cls(counts, (places < counts[:, None])[:, None, None], held)

    @property
    def rows(self) -> int:
        return len(self.lengths)


def slot_attention(query: Tensor, step: SlotStep, window: int | None, scale: float | None) -> Tensor:
    """softmax(s q K) V over what each row has seen, in fp32 where it sums.

    Args:
        query: (1, heads, tokens, dim), of which the first are those of the step's rows.
        window: how many of its last tokens a row sees; all without it.

    Returns:
        (1, rows, heads, dim).
    """
    key, value = step.held.of_rows()
    _, heads, _, dim = query.shape
    # The queries of a key head stand together: nothing is repeated.
    grouped = query[0, :, : step.rows].transpose(0, 1).reshape(step.rows, key.shape[1], -1, dim)
    seen = step.seen
    if window is not None and key.shape[2] > window:
        places = torch.arange(key.shape[2], device=query.device)
        seen = seen & (places >= (step.lengths - window)[:, None])[:, None, None]
    # Keys first: with them second the product would copy all of them, since a slot is longer than what is seen of it.
    scores = (key @ grouped.mT).mT.float() * (dim**-0.5 if scale is None else scale)
    p = scores.masked_fill_(~seen, float("-inf")).softmax(-1).to(value.dtype)
    return (p @ value).view(1, step.rows, heads, -1)
