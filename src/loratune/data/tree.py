"""Prefixes that rows share, as a tree: what several rows begin with goes through the model once.

A node holds tokens that all its rows have in common; its rows continue in its children. Nodes come depth first, so a
node's ancestors stand before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Tokens = Sequence[int]

# A prefix is worth a node of its own from this length: each node costs an attention call in every layer.
LEAST_SHARED = 16


@dataclass(frozen=True, slots=True)
class Node:
    """Tokens `start` to `stop` of every row in `rows` (indices, ascending).

    Attributes:
        owner: the first of the rows that the tree was made for; dropout counts a shared token as this row's.
        above: indices of the node's ancestors, from the root down; their tokens are 0 to `start`.
    """

    start: int
    stop: int
    rows: tuple[int, ...]
    owner: int
    above: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        return self.stop - self.start


def prefix_tree(rows: Sequence[Tokens], *, least: int = LEAST_SHARED) -> list[Node]:
    """The rows as a tree; every token of a row stands in one of the nodes on its path.

    Args:
        least: shortest prefix that gets a node of its own; shorter ones are repeated.
    """
    order = sorted_rows(rows)
    common = [0, *(common_prefix(rows[a], rows[b]) for a, b in pairwise(order))]
    return _Tree(rows, order, common, least).nodes


def subtree(nodes: Sequence[Node], chosen: Sequence[int]) -> list[Node]:
    """The tree of some of its rows, which are numbered by their place in `chosen`; owners stay what they are."""
    place = {row: i for i, row in enumerate(chosen)}
    number: dict[int, int] = {}
    kept: list[Node] = []
    for i, node in enumerate(nodes):
        rows = tuple(sorted(place[row] for row in node.rows if row in place))
        if rows:
            number[i] = len(kept)
            kept.append(Node(node.start, node.stop, rows, node.owner, tuple(number[a] for a in node.above)))
    return kept


def sorted_rows(rows: Sequence[Tokens]) -> list[int]:
    """Indices in the order of the rows' tokens: rows with a common prefix are neighbours."""
    return sorted(range(len(rows)), key=lambda i: tuple(rows[i]))


def common_prefix(a: Tokens, b: Tokens) -> int:
    """How many tokens two rows begin with in common."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    low, high = 0, shorter  # equal up to low, different somewhere before high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def tree_tokens(nodes: Sequence[Node]) -> int:
    """Tokens that go through the model."""
    return sum(node.length for node in nodes)


class _Tree:
    """Built from the rows in sorted order, where `common[i]` tokens are shared with the row before."""

    def __init__(self, rows: Sequence[Tokens], order: list[int], common: list[int], least: int) -> None:
        self.rows, self.order, self.common, self.least = rows, order, common, least
        self.nodes: list[Node] = []
        self._grow(0, len(order), 0, ())

    def _grow(self, first: int, last: int, depth: int, above: tuple[int, ...]) -> None:
        """Nodes for the rows `first` to `last` of the order, which have their first `depth` tokens in `above`."""
        if first == last:
            return
        shared = min(self.common[first + 1 : last], default=len(self.rows[self.order[first]]))
        if shared - depth >= self.least or last - first == 1:
            self._node(first, last, depth, shared, above)
        else:
            self._split(first, last, depth, depth + self.least, above)

    def _node(self, first: int, last: int, depth: int, stop: int, above: tuple[int, ...]) -> None:
        if stop > depth:
            rows = tuple(sorted(self.order[first:last]))
            self.nodes.append(Node(depth, stop, rows, rows[0], above))
            above = (*above, len(self.nodes) - 1)
        # Rows that end here come first in the order and need no node below.
        while first < last and len(self.rows[self.order[first]]) == stop:
            first += 1
        self._split(first, last, stop, stop + 1, above)

    def _split(self, first: int, last: int, depth: int, least: int, above: tuple[int, ...]) -> None:
        """Grow each run of rows that share at least `least` tokens."""
        begin = first
        for i in range(first + 1, last + 1):
            if i == last or self.common[i] < least:
                self._grow(begin, i, depth, above)
                begin = i
