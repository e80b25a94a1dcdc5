"""How a step's rows go through the model: laid out in one of three ways, in micro-batches that change no result.

Several processes divide a step's rows among them; that changes no result either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

from loratune.data.batch import Batch, make_batch, offsets, tree_of
from loratune.data.labelled import Labelled, stack_labelled
from loratune.data.located import Located, stack_located
from loratune.data.matched import Matched, stack_matched
from loratune.data.render import Rendered
from loratune.data.translated import Translated, stack_translated
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


@dataclass(frozen=True, slots=True)
class Part:
    """Which of several equal parts of the work: that of process `number` out of `of`."""

    number: int = 0
    of: int = 1


WHOLE = Part()


def batches(rows: Sequence[Rendered], layout: Layout, *, limit: int, pad_id: int, part: Part = WHOLE) -> list[Batch]:
    """The rows of a step, or of an evaluation, as micro-batches.

    Every part has the same number of them, since sharded processes wait for each other in each: where its rows are
    fewer, the last ones are idle.

    Args:
        limit: tokens of a micro-batch, pads included and shared ones counted once. A longer row goes alone.
        part: whose rows; tokens keep their places in the step's canonical order, whoever computes them.
    """
    starts, lengths = offsets(rows), [row.needed for row in rows]
    # One tree for all micro-batches: which row a shared token belongs to must not depend on the split.
    tree = tree_of(rows) if layout is Layout.TREE else None

    def made(group: Sequence[int]) -> Batch:
        some = [rows[i] for i in group]
        if tree is not None:
            return make_batch(some, packed=True, pad_id=pad_id, starts=starts, tree=subtree(tree, group))
        packed = layout is Layout.PACKED
        return one_batch(some, packed=packed, pad_id=pad_id, starts=[starts[i] for i in group])

    matched = [row for row in rows if isinstance(row, Matched)]
    if matched:  # compared with each other: one batch, of which the model sees as much at a time as the limit says
        return [stack_matched(matched, pad_id=pad_id, starts=starts, at_once=limit)]
    plans = [_groups(share, lengths, layout, limit, tree) for share in _shares(lengths, tree, part.of)]
    mine = [made(group) for group in plans[part.number]]
    missing = max(map(len, plans)) - len(mine)
    if missing:
        shortest = min(range(len(rows)), key=lengths.__getitem__)
        mine += [made([shortest]).idle()] * missing
    return mine


# What puts rows into tensors that teach something else than the next token.
_STACKED: Mapping[type[Rendered], Callable[..., Batch]] = {
    Labelled: stack_labelled,
    Located: stack_located,
    Matched: stack_matched,
    Translated: stack_translated,
}


def one_batch(rows: Sequence[Rendered], *, packed: bool, pad_id: int, starts: Sequence[int] | None = None) -> Batch:
    """Rows of any one kind, all of them at once; `starts` as in `make_batch`."""
    stack = _STACKED.get(type(rows[0]))
    if stack is None:
        return make_batch(rows, packed=packed, pad_id=pad_id, starts=starts)
    return stack(rows, pad_id=pad_id, starts=offsets(rows) if starts is None else starts)


def _groups(
    share: Sequence[int], lengths: Sequence[int], layout: Layout, limit: int, tree: Sequence[Node] | None
) -> list[list[int]]:
    """Some of the rows in micro-batches, by their indices."""
    if tree is not None:
        found = tree_micro_batches(subtree(tree, share), limit)
    else:
        found = micro_batches([lengths[i] for i in share], limit, packed=layout is Layout.PACKED)
    return [[share[i] for i in group] for group in found]


def _shares(lengths: Sequence[int], tree: Sequence[Node] | None, count: int) -> list[list[int]]:
    """Indices of the rows for each of `count` parts, which have about as many tokens; some may be empty."""
    if count == 1:
        return [list(range(len(lengths)))]
    if tree is not None:
        return _tree_shares(tree, count)
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    # The longest first, each to who has least (Graham, 1969): at most a third more than the best division.
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        part = loads.index(min(loads))
        shares[part].append(i)
        loads[part] += lengths[i]
    return [sorted(share) for share in shares]


def _tree_shares(tree: Sequence[Node], count: int) -> list[list[int]]:
    """Neighbours in the tree stay together: the cut into at most `count` ranges whose largest is smallest."""
    order, lengths, shared = _side_by_side(tree)
    low, high = max(lengths), sum(lengths)
    while low < high:
        middle = (low + high) // 2
        if len(_filled(lengths, shared, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    shares = [sorted(order[begin:end]) for begin, end in _filled(lengths, shared, low)]
    return shares + [[] for _ in range(count - len(shares))]


def _filled(lengths: Sequence[int], shared: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Ranges of neighbours, each with as many as `limit` tokens hold."""
    ranges: list[tuple[int, int]] = []
    begin = tokens = 0
    for i, length in enumerate(lengths):
        more = length - (shared[i] if i > begin else 0)
        if i > begin and tokens + more > limit:
            ranges.append((begin, i))
            begin, tokens, more = i, 0, length
        tokens += more
    return [*ranges, (begin, len(lengths))]


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
    order, lengths, shared = _side_by_side(tree)
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


def _side_by_side(tree: Sequence[Node]) -> tuple[list[int], list[int], list[int]]:
    """The rows in the tree's order, the tokens of each, and how many of these it shares with the one before."""
    paths = {row: (*node.above, i) for i, node in enumerate(tree) for row in node.rows}
    order = sorted(paths, key=paths.__getitem__)
    lengths = [tree[paths[row][-1]].stop for row in order]
    return order, lengths, [0, *(_shared(tree, paths[a], paths[b]) for a, b in pairwise(order))]


def sharing(rows: Sequence[Tokens]) -> tuple[int, int]:
    """Tokens of the rows of one step, and those of their tree."""
    return sum(len(row) for row in rows), tree_tokens(prefix_tree(rows))


def _shared(tree: Sequence[Node], a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that two rows share, given by their paths."""
    common = [i for i, j in zip(a, b, strict=False) if i == j]
    return tree[common[-1]].stop if common else 0


def _cost(lengths: Sequence[int], packed: bool) -> int:
    return sum(lengths) if packed else max(lengths) * len(lengths)
