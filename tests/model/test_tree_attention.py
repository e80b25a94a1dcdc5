"""Attention by products over a tree, against a dense masked softmax in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratune.model import tree_attention as products
from loratune.model.tree_attention import plan_of, tree_attention
from tests.estimation.test_memory import most_held
from tests.oracle.attention import Above, dense, trees


def tensors(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(tokens)
    return [(torch.randn(n, tokens, 8, dtype=torch.float64) * 2).to(dtype).requires_grad_() for n in (6, 2, 2)]


@settings(max_examples=100, deadline=None)
@given(trees(), st.sampled_from([None, 1, 3, 7]), st.sampled_from([(1, 40), (0.1, 9), (8, 1 << 19), (6000, 1 << 19)]))
def test_output_and_gradients(tree: tuple[tuple[int, ...], Above], window: int | None, size: tuple[float, int]) -> None:
    """With many small tiles and few large ones, on rows of whole vectors and others, alone and side by side."""
    (segments, above), tokens = tree, sum(tree[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_TILE", size[0])
        patch.setattr(products, "_KEY", 0)
        patch.setattr(products, "_PAIRS", size[1])
        patch.setattr(products, "_FEWEST_QUERIES", 2)
        patch.setattr(products, "_VECTOR", 4)
        plan_of.cache_clear()
        plan = plan_of(segments, above, window)
        plan_of.cache_clear()
    inputs = tensors(tokens, torch.float64)
    found, expected = tree_attention(*inputs, plan, None), dense(*inputs, segments, above, window)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [None, 64])
def test_bf16_is_as_near_as_the_plain_formula_in_bf16(window: int | None) -> None:
    segments, above = (150, 40, 30, 60), ((), (0,), (0,), ())
    low = tensors(sum(segments), torch.bfloat16)
    high = [t.detach().double().requires_grad_() for t in low]
    plan = plan_of(segments, above, window)
    mine, plain, right = (
        tree_attention(*low, plan, None),
        dense(*low, segments, above, window),
        dense(*high, segments, above, window),
    )
    grad = torch.randn_like(right)
    tensors_of = lambda out, inputs: (out, *torch.autograd.grad(out, inputs, grad.to(out.dtype)))  # noqa: E731
    for found, eager, exact in zip(tensors_of(mine, low), tensors_of(plain, low), tensors_of(right, high), strict=True):
        assert (found - exact).norm() <= 1.2 * (eager - exact).norm()


def test_keeps_nothing_quadratic() -> None:
    segments = (400,)
    inputs = tensors(400, torch.float32)
    plan = plan_of(segments, None, None)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        tree_attention(*inputs, plan, None)
    assert max(kept) == 6 * 400 * 8


def pairs(segments: tuple[int, ...], above: Above | None = None, window: int | None = None) -> int:
    """Pairs of query and key that are computed, pads included."""
    batches = plan_of(segments, above, window).batches
    return sum(b.number * t.queries * (t.seen[1] - t.seen[0]) for b in batches for t in b.tiles)


def test_leaves_out_most_of_what_causality_forbids() -> None:
    assert pairs((1024,)) < 0.6 * 1024**2
    assert pairs((256, 250, 255)) < 0.75 * 3 * 256**2


def test_leaves_out_what_a_window_does_not_reach() -> None:
    assert pairs((4096,), None, 256) < 0.15 * 4096**2


def test_rows_of_similar_length_are_computed_side_by_side() -> None:
    lengths = (100, 90, 95, 80, 300, 310)
    assert [b.number for b in plan_of(lengths, None, None).batches] == [2, 4]
    assert pairs(lengths) < 1.5 * sum(n * n for n in lengths)


def test_branches_of_one_prefix_are_computed_side_by_side() -> None:
    batches = plan_of((100, 30, 28, 31, 70, 30), ((), (0,), (0,), (0,), (), (4,)), None).batches
    assert sorted((b.known, b.number) for b in batches) == [(0, 2), (70, 1), (100, 3)]


def test_the_backward_pass_holds_nothing_quadratic() -> None:
    """A long row has many tiles, and each of them gives a gradient to its whole path."""
    held = []
    for tokens in (2048, 4096):
        inputs = [torch.randn(2, tokens, 8, requires_grad=True) for _ in range(3)]
        output = tree_attention(*inputs, plan_of((tokens,), None, None), None)
        held.append(most_held(output.sum().backward))
    # Scores of so many pairs at once stand beside what grows with the tokens.
    assert held[1] < 2.2 * held[0]
    assert held[1] < 2 * products._PAIRS * 2 * 4 + 30 * 4096 * 2 * 8 * 4


@pytest.mark.parametrize(
    ("lanes", "queries", "known"), [(1, 60_000, 0), (1, 40, 60_000), (3, 500, 8000), (1, 100, 1 << 19)]
)
def test_scores_of_no_tile_are_more_than_fit(lanes: int, queries: int, known: int) -> None:
    cuts = products._cuts(lanes, queries, known)
    tiles = list(pairwise(cuts))
    assert (cuts[0], cuts[-1]) == (0, queries)
    assert all(begin < end for begin, end in tiles)
    most = max((end - begin) * lanes * (known + end) for begin, end in tiles)
    assert most <= 1.3 * max(products._PAIRS, lanes * (known + queries))
