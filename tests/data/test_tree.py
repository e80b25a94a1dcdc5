"""The tree of prefixes that rows share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.data.tree import Node, common_prefix, neighbours, prefix_tree, subtree, tree_tokens

Row = tuple[int, ...]

# Two or three different tokens, so that rows share, end inside each other and repeat.
ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), min_size=1, max_size=9)
QUICK = settings(derandomize=True, deadline=None, database=None, max_examples=400)


def path_of(nodes: Sequence[Node], row: int) -> list[int]:
    return [i for i, node in enumerate(nodes) if row in node.rows]


@QUICK
@given(rows=ROWS, least=st.integers(1, 6))
def test_every_row_is_the_tokens_on_its_path(rows: list[Row], least: int) -> None:
    nodes = prefix_tree(rows, least=least)
    for number, row in enumerate(rows):
        path = path_of(nodes, number)
        spelled = [rows[nodes[i].rows[0]][nodes[i].start : nodes[i].stop] for i in path]
        assert tuple(token for tokens in spelled for token in tokens) == row
        assert nodes[path[-1]].above == tuple(path[:-1]), "ancestors from the root down, all before it"


@QUICK
@given(rows=ROWS, least=st.integers(1, 6))
def test_a_node_holds_what_its_rows_have_in_common_and_is_worth_it(rows: list[Row], least: int) -> None:
    for node in prefix_tree(rows, least=least):
        assert node.length > 0
        assert len({rows[i][: node.stop] for i in node.rows}) == 1
        assert list(node.rows) == sorted(node.rows)
        assert node.owner == min(node.rows)
        assert len(node.rows) == 1 or node.length >= least


@QUICK
@given(rows=ROWS)
def test_no_token_twice(rows: list[Row]) -> None:
    """Where every prefix may have a node, as many tokens are computed as there are different prefixes."""
    prefixes = {row[:length] for row in rows for length in range(1, len(row) + 1)}
    assert tree_tokens(prefix_tree(rows, least=1)) == len(prefixes)


def test_short_prefixes_are_repeated() -> None:
    rows = [(1, 2, 3, 4), (1, 2, 3, 5), (1, 9)]
    assert tree_tokens(prefix_tree(rows, least=4)) == 10
    assert tree_tokens(prefix_tree(rows, least=3)) == 7
    assert tree_tokens(prefix_tree(rows, least=1)) == 6


def test_it_does_not_depend_on_the_order_of_the_rows() -> None:
    rows = [(1, 2, 3), (1, 2, 4), (5,), (1, 2), (1, 2, 3)]
    found = {tuple(sorted(rows[i] for i in node.rows)) for node in prefix_tree(rows, least=1)}
    turned = rows[::-1]
    assert found == {tuple(sorted(turned[i] for i in node.rows)) for node in prefix_tree(turned, least=1)}


@QUICK
@given(a=st.lists(st.integers(0, 1), max_size=20).map(tuple), b=st.lists(st.integers(0, 1), max_size=20).map(tuple))
def test_common_prefix(a: Row, b: Row) -> None:
    slow = 0
    while slow < min(len(a), len(b)) and a[slow] == b[slow]:
        slow += 1
    assert common_prefix(a, b) == slow


@QUICK
@given(rows=ROWS, least=st.integers(1, 6), data=st.data())
def test_the_tree_of_some_rows(rows: list[Row], least: int, data: st.DataObject) -> None:
    nodes = prefix_tree(rows, least=least)
    chosen = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, unique=True))
    part = subtree(nodes, chosen)
    owners = {
        (row, position): node.owner for node in nodes for row in node.rows for position in range(node.start, node.stop)
    }
    for number, row in enumerate(chosen):
        path = path_of(part, number)
        assert [(part[i].start, part[i].stop) for i in path] == [
            (nodes[i].start, nodes[i].stop) for i in path_of(nodes, row)
        ]
        assert part[path[-1]].above == tuple(path[:-1])
        assert all(part[i].owner == owners[row, part[i].start] for i in path), "as in the whole tree"


@QUICK
@given(
    rows=st.lists(
        st.lists(st.sampled_from([0, 1, 255, 256, 70_000, 2**31]), max_size=6).map(tuple), min_size=1, max_size=9
    )
)
def test_neighbours_are_sorted_by_tokens(rows: list[Row]) -> None:
    """Also where a token has several bytes, the first of which are alike."""
    found = neighbours(rows)
    assert [rows[i] for i in found.order] == sorted(rows)
    assert found.lengths == [len(row) for row in rows]
    assert found.common[:1] == [0]
    for (before, here), shared in zip(pairwise(found.order), found.common[1:], strict=True):
        assert shared == common_prefix(rows[before], rows[here])


def test_equal_rows_keep_their_order() -> None:
    assert neighbours([(2,), (1,), (2,), (1,)]).order == [1, 3, 0, 2]


def test_rows_that_continue_each_other_may_be_many() -> None:
    """A conversation cut after each of its turns nests deeper than Python recurses."""
    rows = [tuple(range(length)) for length in range(1, 2001)]
    nodes = prefix_tree(rows, least=1)
    assert tree_tokens(nodes) == 2000
    assert nodes[-1].above == tuple(range(1999))


@pytest.mark.parametrize("least", [1, 16])
def test_one_row_is_one_node(least: int) -> None:
    assert prefix_tree([(7, 8, 9)], least=least) == [Node(0, 3, (0,), 0)]
