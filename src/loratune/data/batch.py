"""Rows as tensors: packed side by side, or padded where a family cannot take packed rows."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loratune.data.render import Rendered
from loratune.data.tree import Node, prefix_tree

_Ints = NDArray[np.int64]


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

    def idle(self) -> Batch:
        """The same pass with a loss and gradients of zero: for a process that waits while others have more rows."""
        return replace(self, times=torch.zeros(self.targets.numel()), examples=0, computed_tokens=0)

    def to(self, device: torch.device) -> Self:
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        moved: dict[str, Any] = {name: value.to(device) for name, value in values if isinstance(value, Tensor)}
        return replace(self, **moved)


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
    whole = [Node(0, row.needed, (i,), i) for i, row in enumerate(rows)]
    return _packed(rows, whole if tree is None else tree, starts)


def tree_of(rows: Sequence[Rendered]) -> list[Node]:
    """The prefixes that rows share, as far as they go through the model."""
    return prefix_tree([computed(row) for row in rows])


def computed(row: Rendered) -> tuple[int, ...]:
    """The tokens of a row that go through the model."""
    return row.ids[: row.needed]


def _packed(rows: Sequence[Rendered], nodes: Sequence[Node], starts: Sequence[int]) -> Batch:
    """Nodes side by side in one row of tokens."""
    ids = _numbers(rows[node.rows[0]].ids[node.start : node.stop] for node in nodes)
    positions = np.concatenate([np.arange(node.start, node.stop) for node in nodes])
    counters = np.concatenate([np.arange(node.start, node.stop) + starts[node.owner] for node in nodes])
    places = np.cumsum([0, *(node.length for node in nodes)])
    scored, targets, times = zip(*(_targets(rows, node) for node in nodes), strict=True)
    often = np.concatenate(times)
    return Batch(
        torch.from_numpy(ids)[None],
        torch.from_numpy(positions)[None],
        tuple(node.length for node in nodes),
        None,
        torch.from_numpy(np.concatenate([place + there for place, there in zip(places[:-1], scored, strict=True)])),
        torch.from_numpy(np.concatenate(targets)),
        torch.from_numpy(counters)[None],
        len(rows),
        len(ids),
        tuple(node.above for node in nodes) if any(node.above for node in nodes) else None,
        torch.from_numpy(often.astype(np.float32)) if (often > 1).any() else None,
    )


def _targets(rows: Sequence[Rendered], node: Node) -> tuple[_Ints, _Ints, _Ints]:
    """What the node's positions predict: positions in it, targets, and in how many of its rows."""
    pairs = [_supervised(rows[i], node.start, node.stop) for i in node.rows]
    if len(pairs) == 1:
        ((here, targets),) = pairs
        return here, targets, np.ones_like(here)
    # A position may predict several tokens: each pair of the two is one number.
    both = np.concatenate([here << 32 | targets for here, targets in pairs])
    different, times = np.unique(both, return_counts=True)
    return different >> 32, different & 0xFFFFFFFF, times


def _supervised(row: Rendered, start: int, stop: int) -> tuple[_Ints, _Ints]:
    """The positions from `start` to `stop` that predict a supervised token, counted from `start`, and these tokens."""
    following = slice(start + 1, stop + 1)
    here = np.flatnonzero(np.frombuffer(bytes(row.supervised[following]), np.bool_))
    return here, _numbers([row.ids[following]])[here]


def _numbers(parts: Iterable[Sequence[int]]) -> _Ints:
    """Token ids one after the other; through an `array`, which reads tuples twice as fast as numpy does."""
    numbers = array("I")
    for part in parts:
        numbers.extend(part)
    return np.frombuffer(numbers, np.uintc).astype(np.int64)


def _padded(rows: Sequence[Rendered], pad_id: int, starts: Sequence[int]) -> Batch:
    ids, positions, counters, mask = padded_tokens(rows, pad_id, starts)
    scored, targets = [], []
    for number, row in enumerate(rows):
        here, predicted = _supervised(row, 0, row.needed)
        scored.append(number * ids.shape[1] + here)
        targets.append(predicted)
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        None,
        torch.from_numpy(mask),
        torch.from_numpy(np.concatenate(scored)),
        torch.from_numpy(np.concatenate(targets)),
        torch.from_numpy(counters),
        len(rows),
        int(mask.sum()),
    )


def padded_tokens(
    rows: Sequence[Rendered], pad_id: int, starts: Sequence[int]
) -> tuple[_Ints, _Ints, _Ints, NDArray[np.bool_]]:
    """What goes through the model of each row, below each other: ids, positions, counters, and where there are any."""
    lengths = [row.needed for row in rows]
    shape = (len(rows), max(lengths))
    ids = np.full(shape, pad_id, np.int64)
    positions = np.zeros(shape, np.int64)
    counters = np.zeros(shape, np.int64)
    mask = np.zeros(shape, np.bool_)
    for number, (row, length, start) in enumerate(zip(rows, lengths, starts, strict=True)):
        ids[number, :length] = _numbers([row.ids[:length]])
        positions[number, :length] = np.arange(length)
        counters[number, :length] = np.arange(start, start + length)
        mask[number, :length] = True
    return ids, positions, counters, mask


def offsets(rows: Sequence[Rendered]) -> list[int]:
    """Where each row's tokens start in the canonical order: rows one after the other, whole."""
    starts, total = [], 0
    for row in rows:
        starts.append(total)
        total += len(row.ids)
    return starts
