"""Which rows make a step: random order, or groups of rows that begin alike, mixed at random."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from loratune.data.tree import LEAST_SHARED, Tokens, neighbours, tree_of_neighbours

# A prefix groups rows if it is this share of what a row has beyond the prefix of all rows.
_WORTH_A_GROUP = 0.1
# Rows of a bundle: in four rows three of four common prefixes are saved. Larger steps have room for larger bundles, but
# more than eight hardly save more.
_BUNDLE, _LARGEST_BUNDLE = 4, 8


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Rows that begin alike, in groups within groups.

    Attributes:
        above: for each group the one it is part of, which stands before it; -1 for none.
        rows: for each group its rows that are in no smaller one.
        loose: rows of no group.
    """

    above: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    loose: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """The rows of each optimizer step, a function of (seed, step) alone.

    Every epoch is a permutation of its own; its last step takes what is left. With groups, rows that begin alike come
    into a step together, a few at a time, so that each step mixes several such bundles.
    """

    rows: int
    batch_size: int
    seed: int
    groups: Groups | None = None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    def step(self, number: int) -> tuple[int, ...]:
        """Row indices of step `number`, counted from 0."""
        epoch, within = divmod(number, self.steps_per_epoch)
        return _epoch(self, epoch)[within]


def bundle_size(batch_size: int) -> int:
    """Most rows of one bundle, so that a step mixes at least two, from 16 rows on four; 1 where there is no room."""
    return max(1, min(batch_size // 2, max(_BUNDLE, batch_size // 4), _LARGEST_BUNDLE))


def groups_of(rows: Iterable[Tokens]) -> Groups:
    """The groups of a whole data set: a node of its tree of prefixes is one, if it has several rows."""
    found = neighbours(rows)
    beyond = sum(found.lengths) / len(found.lengths) - min(found.common[1:], default=0)
    nodes = tree_of_neighbours(found, least=max(LEAST_SHARED, math.ceil(_WORTH_A_GROUP * beyond)))
    number = {-1: -1}  # of a node's group
    above: list[int] = []
    innermost = [-1] * len(found.lengths)
    for i, node in enumerate(nodes):
        if len(node.rows) > 1:
            number[i] = len(above)
            above.append(number[node.above[-1] if node.above else -1])
            for row in node.rows:
                innermost[row] = number[i]
    members: list[list[int]] = [[] for _ in range(len(above) + 1)]
    for row, group in enumerate(innermost):
        members[group].append(row)
    *own, loose = map(tuple, members)
    return Groups(tuple(above), tuple(own), loose)


@lru_cache(maxsize=2)
def _epoch(order: Order, epoch: int) -> tuple[tuple[int, ...], ...]:
    """The steps of one epoch."""
    # Not secret, only the same everywhere: Python keeps this generator's numbers from version to version.
    dice = random.Random(f"order {order.seed} {epoch}")  # noqa: S311
    if order.groups is not None:
        bundles = _bundles(order.groups, bundle_size(order.batch_size), dice)
        return tuple(map(tuple, _filled(bundles, order.batch_size, dice)))
    rows = list(range(order.rows))
    dice.shuffle(rows)
    return tuple(tuple(rows[i : i + order.batch_size]) for i in range(0, order.rows, order.batch_size))


def _bundles(groups: Groups, size: int, dice: random.Random) -> list[list[int]]:
    """All rows in bundles of at most `size`, from the innermost groups outwards: what is left over joins the next."""
    pieces = [[[row] for row in own] for own in groups.rows]
    bundles = [[row] for row in groups.loose]
    for i in range(len(pieces) - 1, -1, -1):
        above = groups.above[i]
        for bundle in _filled(pieces[i], size, dice):
            (bundles if above < 0 or len(bundle) == size else pieces[above]).append(bundle)
    return bundles


def _filled(pieces: Sequence[list[int]], size: int, dice: random.Random) -> list[list[int]]:
    """Put pieces of at most `size` rows together in random order, `size` rows at a time; the last takes what is left.

    Where the next piece has no room the first that has some goes before it, and only if there is none it is cut.
    """
    waiting: dict[int, deque[tuple[int, list[int]]]] = {}
    turns = list(range(len(pieces)))
    dice.shuffle(turns)
    for turn, i in enumerate(turns):
        waiting.setdefault(len(pieces[i]), deque()).append((turn, pieces[i]))
    filled: list[list[int]] = []
    turn, room = len(pieces), 0
    while waiting:
        if room == 0:
            filled.append([])
            room = size
        length = min((n for n in waiting if n <= room), key=lambda n: waiting[n][0][0], default=0)
        chosen = length or min(waiting, key=lambda n: waiting[n][0][0])
        piece = waiting[chosen].popleft()[1]
        if not waiting[chosen]:
            del waiting[chosen]
        if not length:
            waiting.setdefault(chosen - room, deque()).append((turn, piece[room:]))
            turn += 1
        filled[-1] += piece[:room]
        room -= min(room, chosen)
    return filled
