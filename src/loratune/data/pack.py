"""How a step's rows go through the model: laid out in one of three ways, in micro-batches that change no result."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from itertools import pairwise

from loratune.data.batch import Batch, make_batch, needed, offsets, tree_of
from loratune.data.render import Rendered
from loratune.data.tree import Node, Tokens, prefix_tree, subtree, tree_tokens


class Layout(Enum):
    """How rows that go through the model at once are laid out.

    Attributes:
        PADDED: below each other, with pads behind the shorter ones.
        PACKED: side by side, each attending to itself alone.
        TREE: side by side, and what several rows begin with is there once.
    """

    PADDED = "padded"
    PACKED = "packed"
    TREE = "tree"


def batches(rows: Sequence[Rendered], layout: Layout, *, limit: int, pad_id: int) -> list[Batch]:
    """The rows of a step, or of an evaluation, as micro-batches.

    Args:
        limit: tokens of a micro-batch, pads included and shared ones counted once. A longer row goes alone.
    """
    starts = offsets(rows)
    if layout is not Layout.TREE:
        groups = micro_batches([needed(row) for row in rows], limit, packed=layout is Layout.PACKED)
        return [
            make_batch(
                [rows[i] for i in group],
                packed=layout is Layout.PACKED,
                pad_id=pad_id,
                starts=[starts[i] for i in group],
            )
            for group in groups
        ]
    # One tree for all micro-batches: which row a shared token belongs to must not depend on the split.
    tree = tree_of(rows)
    return [
        make_batch([rows[i] for i in group], packed=True, pad_id=pad_id, starts=starts, tree=subtree(tree, group))
        for group in tree_micro_batches(tree, limit)
    ]


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


def tree_micro_batches(tree: Sequence[Node], limit: int) -> list[list[int]]:
    """Split the rows of a tree where they have least in common, so that the fewest tokens are computed twice.

    Args:
        limit: tokens of a group, a shared one counted once. A longer row goes alone.

    Returns:
        Indices of rows, ascending in each group; of the splits that compute the fewest tokens, one into fewest groups.
    """
    paths = {row: (*node.above, i) for i, node in enumerate(tree) for row in node.rows}
    order = sorted(paths, key=paths.__getitem__)
    lengths = [tree[paths[row][-1]].stop for row in order]
    shared = [0, *(_shared(tree, paths[a], paths[b]) for a, b in pairwise(order))]
    # Of the first rows, 0 of them, 1, …: tokens computed again, groups, and where the last group begins.
    best = [(0, 0, 0)]
    for end in range(1, len(order) + 1):
        choices = []
        tokens = 0
        for begin in range(end - 1, -1, -1):
            tokens += lengths[begin] - (shared[begin + 1] if begin + 1 < end else 0)
            if tokens > limit and begin + 1 < end:
                break
            again, count, _ = best[begin]
            choices.append((again + shared[begin], count + 1, begin))
        best.append(min(choices))
    groups: list[list[int]] = []
    end = len(order)
    while end:
        begin = best[end][2]
        groups.append(sorted(order[begin:end]))
        end = begin
    return groups[::-1]


def sharing(rows: Sequence[Tokens]) -> tuple[int, int]:
    """Tokens of the rows of one step, and those of their tree."""
    return sum(len(row) for row in rows), tree_tokens(prefix_tree(rows))


def _shared(tree: Sequence[Node], a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that two rows share, given by their paths."""
    common = [i for i, j in zip(a, b, strict=False) if i == j]
    return tree[common[-1]].stop if common else 0


def _cost(lengths: Sequence[int], packed: bool) -> int:
    return sum(lengths) if packed else max(lengths) * len(lengths)
