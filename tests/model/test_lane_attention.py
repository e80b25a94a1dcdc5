"""Attention lane by lane in C against the dense masked softmax, gradients included."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratune.model import attention, c_blocks
from loratune.model.kernels import Kernels
from loratune.model.lane_attention import lane_attention, takes
from loratune.model.lanes import table_of
from loratune.model.tree_attention import plan_of, tree_attention
from tests.oracle.attention import Above, dense, trees, visibility

Tree = tuple[tuple[int, ...], Above]
# Blocks of queries that end inside a lane, lanes that no vector fits, branches of branches.
LONG: Tree = ((70, 50, 33, 1, 130, 17), ((), (0,), (0, 1), (0,), (), (4,)))
FRESH = ((),) * 3


def drawn(tokens: int, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values and the output's gradient, (heads, tokens, dim), in memory token by token."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]), (heads[0], dims[1]))
    return [torch.randn(tokens, *shape, generator=generator).to(dtype).transpose(0, 1) for shape in shapes]


def outcome(attend: Any, tensors: list[Tensor]) -> list[Tensor]:
    """The output (tokens, heads, dim) and the gradients of queries, keys and values."""
    *inputs, gy = tensors
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = attend(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, gy.transpose(0, 1))]


def right(tree: Tree, window: int | None, tensors: list[Tensor], scale: float) -> list[Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense(q * (scale * math.sqrt(q.shape[-1])), k, v, *tree, window)

    return outcome(attend, [t.double() for t in tensors])


def found(tree: Tree, window: int | None, tensors: list[Tensor], scale: float | None = None) -> list[Tensor]:
    table = table_of(*tree, window)
    return outcome(lambda q, k, v: lane_attention(q, k, v, table, window, scale), tensors)


def off(mine: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(mine, exact, strict=True)]


@settings(max_examples=150, deadline=None)
@given(
    trees(),
    st.sampled_from([None, 1, 3, 7]),
    st.sampled_from([(1, 1), (6, 2), (5, 5), (60, 1)]),
    st.sampled_from([(16, 16), (32, 48), (64, 16)]),
    st.sampled_from([None, 0.3]),
)
def test_output_and_gradients(
    tree: Tree, window: int | None, heads: tuple[int, int], dims: tuple[int, int], scale: float | None
) -> None:
    tensors = drawn(sum(tree[0]), heads, dims, torch.float32)
    exact = right(tree, window, tensors, dims[0] ** -0.5 if scale is None else scale)
    for mine, theirs in zip(found(tree, window, tensors, scale), exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 40, 64])
def test_long_lanes(window: int | None) -> None:
    tensors = drawn(sum(LONG[0]), (9, 3), (64, 64), torch.float32)
    exact = right(LONG, window, tensors, 64**-0.5)
    assert max(off(found(LONG, window, tensors), exact)) < 1e-6


@pytest.mark.parametrize("window", [16, 17, 31, 100])
def test_a_window_that_moves_along_a_long_lane(window: int) -> None:
    """What lies before the window of a block of queries is left out, vector by vector."""
    tree: Tree = ((300, 90), ((), (0,)))
    tensors = drawn(390, (4, 2), (16, 32), torch.float32)
    assert max(off(found(tree, window, tensors), right(tree, window, tensors, 0.25))) < 1e-6


@pytest.mark.parametrize("window", [None, 40])
def test_bf16_is_rounded_once(window: int | None) -> None:
    """Nearer to the exact value of the same inputs than products in bf16 are."""
    tensors = drawn(sum(LONG[0]), (9, 3), (64, 64), torch.bfloat16)
    exact = right(LONG, window, tensors, 64**-0.5)
    plan = plan_of(*LONG, window)
    in_bf16 = off(outcome(lambda q, k, v: tree_attention(q, k, v, plan, None), tensors), exact)
    mine = off(found(LONG, window, tensors), exact)
    assert max(mine) < 2e-3
    assert all(a < b for a, b in zip(mine, in_bf16, strict=True))


def test_scores_of_any_size() -> None:
    """The largest score of a row is taken off before anything is raised."""
    tensors = [t * 300 for t in drawn(7, (2, 2), (16, 16), torch.float32)]
    mine = found(((4, 3), ((), (0,))), None, tensors)
    assert all(t.isfinite().all() for t in mine)
    exact = right(((4, 3), ((), (0,))), None, tensors, 0.25)
    torch.testing.assert_close(mine[0].double(), exact[0], rtol=1e-4, atol=1e-2)


def test_what_is_no_number_stays_in_its_lane() -> None:
    tensors = drawn(9, (2, 1), (16, 16), torch.float32)
    tensors[1][0, 4] = torch.nan
    tree = ((3, 3, 3), FRESH)
    y = lane_attention(*tensors[:3], table_of(*tree, None), None, None)
    assert y[3:4].isfinite().all()  # before it
    assert y[4:6].isnan().all()
    assert y[[0, 1, 2, 6, 7, 8]].isfinite().all()


def test_threads_change_no_bit() -> None:
    tensors = drawn(sum(LONG[0]), (6, 2), (32, 32), torch.bfloat16)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(found(LONG, None, tensors))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_gradients_it_is_the_same() -> None:
    tensors = drawn(sum(LONG[0]), (6, 2), (32, 32), torch.float32)
    with torch.no_grad():
        alone = lane_attention(*tensors[:3], table_of(*LONG, None), None, None)
    assert torch.equal(alone, found(LONG, None, tensors)[0])


def test_keeps_its_inputs_and_nothing_else() -> None:
    tensors = drawn(sum(LONG[0]), (6, 2), (32, 32), torch.float32)
    inputs = [t.detach().requires_grad_() for t in tensors[:3]]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lane_attention(*inputs, table_of(*LONG, None), None, None)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in inputs]


def test_keeps_nothing_of_the_projection_that_values_were_a_part_of() -> None:
    """Phi's queries, keys and values are one product's."""
    together = torch.randn(12, 8, 16, requires_grad=True)
    q, k, v = (part.transpose(0, 1) for part in (together * 2).split([4, 2, 2], 1))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = lane_attention(q, k, v, table_of((5, 4, 3), FRESH, None), None, None)
    assert sum(t.untyped_storage().nbytes() for t in kept) == together.numel() * together.itemsize
    y.sum().backward()
    assert together.grad is not None


@settings(max_examples=50, deadline=None)
@given(trees(), st.sampled_from([None, 1, 3, 7]))
def test_pairs_are_counted(tree: Tree, window: int | None) -> None:
    assert table_of(*tree, window).seen == int(visibility(*tree, window).sum())


def test_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(tree: Tree, dim: int = 16, dtype: torch.dtype = torch.float32) -> bool:
        q, k, v = (torch.zeros(1, 2, sum(tree[0]), dim, dtype=dtype) for _ in range(3))
        return takes(q, k, v, table_of(*tree, None))

    few, many = ((700, 30), ((), ())), ((900, 30), ((), ()))
    assert asked(few)
    assert asked(few, dtype=torch.bfloat16)
    assert not asked(many)
    assert not asked(few, dim=24)
    assert not asked(few, dtype=torch.float64)
    monkeypatch.setattr("loratune.model.kernels.kernels_of", lambda _: Kernels(None, "none"))
    assert not asked(few)


def test_a_packed_row_goes_through_them(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = (t[None] for t in drawn(12, (4, 2), (16, 16), torch.float32))
    told: Any = {"segments": (5, 4, 3), "above": FRESH}
    called = []
    monkeypatch.setattr(c_blocks, "attend_forward", lambda *args: called.append(args) or torch.zeros(12, 4, 16))
    y, _ = attention.packed_attention(torch.nn.Module(), q, k, v, None, **told)
    assert len(called) == 1
    assert y.shape == (1, 12, 4, 16)


def test_no_memory_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what training on less at once is for."""
    monkeypatch.setattr(c_blocks._library, "attend_forward_f32", lambda *_: 1)
    tensors = drawn(12, (4, 2), (16, 16), torch.float32)
    with torch.no_grad(), pytest.raises(MemoryError):
        lane_attention(*tensors[:3], table_of((5, 4, 3), FRESH, None), None, None)
