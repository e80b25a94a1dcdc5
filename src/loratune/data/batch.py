"""Rows as tensors: packed side by side, or padded where a family cannot take packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loratune.data.render import Rendered


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch. Packed rows stand in one row of T tokens; padded ones in B rows of T.

    Attributes:
        input_ids, position_ids: int64 (B, T).
        segments: lengths of the packed rows, in order; None where padded.
        attention_mask: bool (B, T), False at pads; None where packed.
        scored: int64 (N,), positions in the flattened (B · T) whose logits predict a supervised token.
        targets: int64 (N,), those tokens.
        tokens: int64 (B, T), each token's index in the step's canonical order (for dropout masks).
        examples, computed_tokens: rows, and what goes through the model without pads.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: tuple[int, ...] | None
    attention_mask: Tensor | None
    scored: Tensor
    targets: Tensor
    tokens: Tensor
    examples: int
    computed_tokens: int

    @property
    def supervised(self) -> int:
        return self.targets.numel()

    def to(self, device: torch.device) -> Batch:
        moved = {
            name: getattr(self, name).to(device)
            for name in ("input_ids", "position_ids", "attention_mask", "scored", "targets", "tokens")
            if getattr(self, name) is not None
        }
        return replace(self, **moved)


def needed(row: Rendered) -> int:
    """How many of a row's tokens must go through the model: what follows the last scored position predicts nothing."""
    return max(i for i, supervised in enumerate(row.supervised) if supervised)


def make_batch(rows: Sequence[Rendered], *, packed: bool, pad_id: int, starts: Sequence[int] | None = None) -> Batch:
    """Put rows into tensors.

    Args:
        starts: index of each row's first token in the step's canonical order; 0, len(row 0), … when not given.
    """
    lengths = [needed(row) for row in rows]
    starts = starts if starts is not None else offsets(rows)
    width = sum(lengths) if packed else max(lengths)
    # Offsets of the rows in the flattened tensor.
    places = [sum(lengths[:i]) if packed else i * width for i in range(len(rows))]
    shape = (1, width) if packed else (len(rows), width)
    ids = torch.full((shape[0] * width,), pad_id)
    positions = torch.zeros(shape[0] * width, dtype=torch.int64)
    counters = torch.zeros(shape[0] * width, dtype=torch.int64)
    mask = torch.zeros(shape[0] * width, dtype=torch.bool)
    scored, targets = [], []
    for row, length, place, start in zip(rows, lengths, places, starts, strict=True):
        there = slice(place, place + length)
        ids[there] = torch.tensor(row.ids[:length])
        positions[there] = torch.arange(length)
        counters[there] = torch.arange(start, start + length)
        mask[there] = True
        for i in range(length):
            if row.supervised[i + 1]:
                scored.append(place + i)
                targets.append(row.ids[i + 1])
    return Batch(
        ids.view(shape),
        positions.view(shape),
        tuple(lengths) if packed else None,
        None if packed else mask.view(shape),
        torch.tensor(scored, dtype=torch.int64),
        torch.tensor(targets, dtype=torch.int64),
        counters.view(shape),
        len(rows),
        sum(lengths),
    )


def offsets(rows: Sequence[Rendered]) -> list[int]:
    """Where each row's tokens start in the canonical order: rows one after the other, whole."""
    starts, total = [], 0
    for row in rows:
        starts.append(total)
        total += len(row.ids)
    return starts
