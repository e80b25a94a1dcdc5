"""Rows as tensors: packed side by side, or padded where a family cannot take packed rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loratune.data.render import Rendered
from loratune.data.tree import Node, prefix_tree


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch. Packed rows stand in one row of T tokens; padded ones in B rows of T.

    Attributes:
        input_ids, position_ids: int64 (B, T).
        segments: lengths of the packed segments, in order; None where padded. A segment is a row, or a node of the tree
            of prefixes that rows share.
        above: for each segment, the segments whose tokens come before its own, from the first; None where no prefix is
            shared.
        attention_mask: bool (B, T), False at pads; None where packed.
        scored: int64 (N,), positions in the flattened (B · T) whose logits predict a supervised token.
        targets: int64 (N,), those tokens.
        times: fp32 (N,), how many rows have this target at this position; None where each has its own.
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
    above: tuple[tuple[int, ...], ...] | None = None
    times: Tensor | None = None

    @property
    def supervised(self) -> int:
        """Supervised tokens of the rows, a shared one counted for each of them."""
        return self.targets.numel() if self.times is None else round(float(self.times.sum()))

    def to(self, device: torch.device) -> Batch:
        names = ("input_ids", "position_ids", "attention_mask", "scored", "targets", "tokens", "times")
        moved = {name: getattr(self, name).to(device) for name in names if getattr(self, name) is not None}
        return replace(self, **moved)


def needed(row: Rendered) -> int:
    """How many of a row's tokens must go through the model: what follows the last scored position predicts nothing."""
    return max(i for i, supervised in enumerate(row.supervised) if supervised)


def make_batch(
    rows: Sequence[Rendered],
    *,
    packed: bool,
    pad_id: int,
    starts: Sequence[int] | None = None,
    tree: Sequence[Node] | None = None,
) -> Batch:
    """Put rows into tensors.

    Args:
        starts: index of each row's first token in the step's canonical order; 0, len(row 0), … when not given. With a
            tree, of each of its owners.
        tree: of packed rows: what they begin with in common goes through the model once.
    """
    starts = starts if starts is not None else offsets(rows)
    if not packed:
        return _padded(rows, pad_id, starts)
    whole = [Node(0, needed(row), (i,), i) for i, row in enumerate(rows)]
    return _packed(rows, whole if tree is None else tree, starts)


def tree_of(rows: Sequence[Rendered]) -> list[Node]:
    """The prefixes that rows share, as far as they go through the model."""
    return prefix_tree([computed(row) for row in rows])


def computed(row: Rendered) -> tuple[int, ...]:
    """The tokens of a row that go through the model."""
    return row.ids[: needed(row)]


def _packed(rows: Sequence[Rendered], nodes: Sequence[Node], starts: Sequence[int]) -> Batch:
    """Nodes side by side in one row of tokens."""
    ids = [token for node in nodes for token in rows[node.rows[0]].ids[node.start : node.stop]]
    positions = [position for node in nodes for position in range(node.start, node.stop)]
    counters = [starts[node.owner] + position for node in nodes for position in range(node.start, node.stop)]
    scored, targets, times = [], [], []
    place = 0
    for node in nodes:
        for position in range(node.start, node.stop):
            for target, count in _targets(rows, node, position).items():
                scored.append(place)
                targets.append(target)
                times.append(count)
            place += 1
    return Batch(
        torch.tensor([ids]),
        torch.tensor([positions]),
        tuple(node.length for node in nodes),
        None,
        torch.tensor(scored, dtype=torch.int64),
        torch.tensor(targets, dtype=torch.int64),
        torch.tensor([counters]),
        len(rows),
        len(ids),
        tuple(node.above for node in nodes) if any(node.above for node in nodes) else None,
        torch.tensor(times, dtype=torch.float32) if any(count > 1 for count in times) else None,
    )


def _targets(rows: Sequence[Rendered], node: Node, position: int) -> Counter[int]:
    """What the position predicts in the rows that go through it, and in how many."""
    here = (rows[i] for i in node.rows)
    return Counter(row.ids[position + 1] for row in here if row.supervised[position + 1])


def _padded(rows: Sequence[Rendered], pad_id: int, starts: Sequence[int]) -> Batch:
    lengths = [needed(row) for row in rows]
    shape = (len(rows), max(lengths))
    ids = torch.full(shape, pad_id)
    positions = torch.zeros(shape, dtype=torch.int64)
    counters = torch.zeros(shape, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.bool)
    scored, targets = [], []
    for number, (row, length, start) in enumerate(zip(rows, lengths, starts, strict=True)):
        ids[number, :length] = torch.tensor(row.ids[:length])
        positions[number, :length] = torch.arange(length)
        counters[number, :length] = torch.arange(start, start + length)
        mask[number, :length] = True
        for i in range(length):
            if row.supervised[i + 1]:
                scored.append(number * shape[1] + i)
                targets.append(row.ids[i + 1])
    return Batch(
        ids,
        positions,
        None,
        mask,
        torch.tensor(scored, dtype=torch.int64),
        torch.tensor(targets, dtype=torch.int64),
        counters,
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
