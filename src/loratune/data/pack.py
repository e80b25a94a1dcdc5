"""Which rows make a step, and how a step's rows go through the model: in micro-batches that never change the result."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from loratune.data.tree import LEAST_SHARED, Tokens, common_prefix, prefix_tree, sorted_rows, tree_tokens


@dataclass(frozen=True, slots=True)
class Order:
    """The rows of each optimizer step, a function of (seed, step) alone.

    Every epoch is a permutation of its own; its last step takes what is left.
    """

    rows: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    def step(self, number: int) -> tuple[int, ...]:
        """Row indices of step `number`, counted from 0."""
        epoch, within = divmod(number, self.steps_per_epoch)
        order = _permutation(self.rows, self.seed, epoch)
        return order[within * self.batch_size : (within + 1) * self.batch_size]


@lru_cache(maxsize=2)
def _permutation(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(rows))
    # Not secret, only the same everywhere: Python keeps this generator's numbers from version to version.
    random.Random(f"order {seed} {epoch}").shuffle(order)  # noqa: S311
    return tuple(order)


def micro_batches(lengths: Sequence[int], limit: int, *, packed: bool) -> list[list[int]]:
    """Split rows into groups that go through the model at once.

    Args:
        lengths: tokens of each row.
        limit: tokens of a group: their sum when packed, rows × longest when padded. A longer row goes alone.

    Returns:
        Indices into `lengths`; every index once, groups of similar lengths when padded.
    """
    order = list(range(len(lengths)))
    if not packed:
        # Neighbours of equal length waste the least padding; stable, so the plan is the same in every process.
        order.sort(key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and _cost([lengths[j] for j in groups[-1]] + [lengths[i]], packed) <= limit:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def shared_micro_batches(rows: Sequence[Tokens], limit: int) -> list[list[int]]:
    """Split rows that share prefixes into groups of at most about `limit` tokens, a shared one counted once.

    Rows with a common prefix come into one group where it has room, so that the prefix is computed once for them.

    Returns:
        Indices into `rows`, ascending in each group; a row that is too long alone goes alone.
    """
    groups: list[list[int]] = []
    cost = 0
    for i in sorted_rows(rows):
        before = groups[-1][-1] if groups else None
        shared = 0 if before is None else common_prefix(rows[before], rows[i])
        more = len(rows[i]) - (shared if shared >= LEAST_SHARED else 0)
        if before is None or cost + more > limit:
            groups.append([])
            cost, more = 0, len(rows[i])
        groups[-1].append(i)
        cost += more
    return [sorted(group) for group in groups]


def sharing(rows: Sequence[Tokens]) -> tuple[int, int]:
    """Tokens of the rows of one step, and those of their tree."""
    return sum(len(row) for row in rows), tree_tokens(prefix_tree(rows))


def _cost(lengths: Sequence[int], packed: bool) -> int:
    return sum(lengths) if packed else max(lengths) * len(lengths)
