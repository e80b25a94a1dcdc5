"""Prefixes that rows share, as a tree: what several rows begin with goes through the model once.

A node holds tokens that all its rows have in common; its rows continue in its children. Nodes come depth first, so a
node's ancestors stand before it.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

Tokens = Sequence[int]

# A prefix is worth a node of its own from this length: in every layer the attention of
# what stands below it is a batch of its own.
LEAST_SHARED = 8


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


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Rows in the order of their tokens, where those with a common prefix stand side by side.

    Attributes:
        order: indices of the rows, in that order.
        common: for each place in the order, how many tokens its row shares with the one before; 0 for the first.
        lengths: tokens of each row, by index.
    """

    order: list[int]
    common: list[int]
    lengths: list[int]


def neighbours(rows: Iterable[Tokens]) -> Neighbours:
    """Sort rows by their tokens; equal ones keep their order."""
    # Bytes compare a hundred times faster than tuples of integers: what counts where a whole data set is sorted.
    keys = [_key(row) for row in rows]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    common = [common_prefix(keys[a], keys[b]) // _WIDTH for a, b in pairwise(order)]
    return Neighbours(order, [0, *common], [len(key) // _WIDTH for key in keys])


def prefix_tree(rows: Iterable[Tokens], *, least: int = LEAST_SHARED) -> list[Node]:
    """The rows as a tree; every token of a row stands in one of the nodes on its path.

    Args:
        least: shortest prefix that gets a node of its own; shorter ones are repeated.
    """
    return tree_of_neighbours(neighbours(rows), least=least)


def tree_of_neighbours(found: Neighbours, *, least: int) -> list[Node]:
    """The tree of rows that are sorted already."""
    order, common, lengths = found.order, found.common, found.lengths
    nodes: list[Node] = []
    # Ranges of the order that still become nodes: first, last, tokens above, indices of the nodes that hold these.
    todo: list[tuple[int, int, int, tuple[int, ...]]] = [(0, len(order), 0, ())]
    while todo:
        first, last, depth, above = todo.pop()
        alone = last - first == 1
        shared = lengths[order[first]] if alone else min(common[first + 1 : last])
        if alone or shared - depth >= least:
            if shared > depth:
                rows = tuple(sorted(order[first:last]))
                nodes.append(Node(depth, shared, rows, rows[0], above))
                above = (*above, len(nodes) - 1)
            # Rows that end here come first in the order and need no node below.
            while first < last and lengths[order[first]] == shared:
                first += 1
            depth, at_least = shared, shared + 1
        else:
            at_least = depth + least
        runs = [(begin, end, depth, above) for begin, end in _runs(common, first, last, at_least)]
        todo += reversed(runs)
    return nodes


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


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
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


_WIDTH = array("I").itemsize


def _key(row: Tokens) -> bytes:
    """A row's tokens as bytes that sort as the tokens do: most significant first."""
    numbers = array("I", row)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers.tobytes()


def _runs(common: Sequence[int], first: int, last: int, least: int) -> Iterator[tuple[int, int]]:
    """Ranges of neighbours that share at least `least` tokens."""
    begin = first
    for i in range(first + 1, last + 1):
        if i == last or common[i] < least:
            yield begin, i
            begin = i
