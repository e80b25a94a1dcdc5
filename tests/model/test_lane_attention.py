"""Attention lane by lane in C against the dense masked softmax, gradients included."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratune.kernels import Kernels, LaneTable, c_blocks, lanes, table_of
from loratune.model import attention
from loratune.model.lane_attention import lane_attention, takes
from loratune.model.tree_attention import plan_of, tree_attention
from tests.oracle.attention import Above, dense, trees, visibility

Tree = tuple[tuple[int, ...], Above]
# Blocks of queries that end inside a lane, lanes that no vector fits, branches of branches.
LONG: Tree = ((70, 50, 33, 1, 130, 17), ((), (0,), (0, 1), (0,), (), (4,)))
FRESH = ((),) * 3
in_tiles = pytest.mark.skipif(not c_blocks.TILES, reason="the processor has no matrix unit")
# Blocks of keys that begin in a path and in a lane; a path that ends inside a tile; several lanes behind one.
LONGER: Tree = ((280, 45, 20, 31, 9, 530), ((), (0,), (0,), (0,), (0, 3), ()))


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


@pytest.mark.parametrize("tree", [LONG, LONGER])
@pytest.mark.parametrize("window", [None, 40, 300])
@pytest.mark.parametrize("tiles", [pytest.param(True, marks=in_tiles), False])
def test_bf16_is_nearer_than_by_torch(tree: Tree, window: int | None, tiles: bool, monkeypatch: Any) -> None:
    """To the exact value of the same inputs: rounded once where products are in fp32."""
    monkeypatch.setattr(c_blocks, "TILES", tiles)
    tensors = drawn(sum(tree[0]), (3, 1), (64, 64), torch.bfloat16)
    exact = right(tree, window, tensors, 64**-0.5)
    plan = plan_of(*tree, window)
    by_torch = off(outcome(lambda q, k, v: tree_attention(q, k, v, plan, None), tensors), exact)
    mine = off(found(tree, window, tensors), exact)
    assert max(mine) < (3e-3 if tiles else 2e-3)
    assert all(a < b for a, b in zip(mine, by_torch, strict=True))


@in_tiles
@settings(max_examples=100, deadline=None)
@given(
    trees(),
    st.sampled_from([None, 1, 3, 7]),
    st.sampled_from([(1, 1), (6, 2), (5, 5), (71, 1)]),
    st.sampled_from([(16, 16), (48, 32), (64, 16), (80, 96)]),
    st.sampled_from([None, 0.3, -0.3]),
)
def test_output_and_gradients_in_tiles(
    tree: Tree, window: int | None, heads: tuple[int, int], dims: tuple[int, int], scale: float | None
) -> None:
    tensors = drawn(sum(tree[0]), heads, dims, torch.bfloat16)
    exact = right(tree, window, tensors, dims[0] ** -0.5 if scale is None else scale)
    for mine, theirs in zip(found(tree, window, tensors, scale), exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-2, atol=2e-2 * max(1, float(theirs.abs().max())))


@in_tiles
@pytest.mark.parametrize("window", [None, 17, 256, 257, 300])
def test_tiles_as_in_fp32(window: int | None) -> None:
    """Of the same numbers, with heads whose dims fill no tile and rows of many heads."""
    for heads, dims in (((4, 2), (16, 48)), ((71, 1), (32, 16))):
        tensors = drawn(sum(LONGER[0]), heads, dims, torch.bfloat16)
        exact = found(LONGER, window, [t.float() for t in tensors])
        assert max(off(found(LONGER, window, tensors), exact)) < 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_any_size(dtype: torch.dtype) -> None:
    """The largest score of a row is taken off before anything is raised."""
    tree: Tree = ((4, 3), ((), (0,)))
    tensors = [t * 300 for t in drawn(7, (2, 2), (16, 16), dtype)]
    mine = found(tree, None, tensors)
    assert all(t.isfinite().all() for t in mine)
    rough = dtype == torch.bfloat16
    torch.testing.assert_close(
        mine[0].double(), right(tree, None, tensors, 0.25)[0], rtol=1e-2 if rough else 1e-4, atol=1e-2
    )


@in_tiles
def test_a_later_block_of_keys_may_hold_the_largest_score() -> None:
    """What was summed before is scaled down to it, or stays as it is."""
    tensors = drawn(700, (2, 1), (16, 16), torch.bfloat16)
    for growth in (1.0, -1.0):
        tensors[1][0] = torch.linspace(0, growth, 700)[:, None] * tensors[0][0, -1]
        exact = right(((700,), ((),)), None, tensors, 3.0)
        y, *gradients = off(found(((700,), ((),)), None, tensors, 3.0), exact)
        assert y < 3e-3
        assert max(gradients) < 3e-2  # the keys are nearly parallel: what is left of a query's gradient is small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_negative_scale_of_large_scores(dtype: torch.dtype) -> None:
    tree: Tree = ((400,), ((),))
    tensors = [t * 10 for t in drawn(400, (2, 2), (16, 16), dtype)]
    y, *_ = found(tree, None, tensors, -1.0)
    assert off([y], right(tree, None, tensors, -1.0)[:1])[0] < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_score_of_minus_infinity_nothing_is_left(dtype: torch.dtype) -> None:
    q, k, v, _ = drawn(40, (1, 1), (16, 16), dtype)
    q[..., 0], k[0, 5, 0] = 1.0, -torch.inf
    with torch.no_grad():
        y = lane_attention(q, k, v, table_of((40,), ((),), None), None, None)
    others = [*range(5), *range(6, 40)]
    scores = (q[0].double() @ k[0].double().T / 4).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
    exact = scores.softmax(-1) @ v[0].double()
    torch.testing.assert_close(y[others, 0].double(), exact[others], rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_number_of_one_branch_reaches_another(which: int, dtype: torch.dtype) -> None:
    """Branches of one run, one after the other in the same room: of a query, key, value or gradient."""
    tree: Tree = ((20, 10, 11, 12), ((), (0,), (0,), (0,)))
    tensors = drawn(53, (2, 1), (16, 16), dtype)
    tensors[which][0, 35] = torch.nan  # in the second branch
    y, gq, gk, gv = found(tree, None, tensors)
    apart = [*range(20, 30), *range(41, 53)]
    assert y[[*range(20), *apart]].isfinite().all()
    assert all(g[:, apart].isfinite().all() for g in (gq, gk, gv))
    assert not (gk[:, :20].isfinite().all() and gv[:, :20].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_stays_in_its_lane(dtype: torch.dtype) -> None:
    tensors = drawn(9, (2, 1), (16, 16), dtype)
    tensors[1][0, 4] = torch.nan
    tree = ((3, 3, 3), FRESH)
    y, *gradients = found(tree, None, tensors)
    assert y[3:4].isfinite().all()  # before it
    assert y[4:6].isnan().all()
    others = [0, 1, 2, 6, 7, 8]
    assert y[others].isfinite().all()
    assert all(g[:, others].isfinite().all() for g in gradients)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_its_inputs_and_nothing_else(dtype: torch.dtype) -> None:
    """In tiles also its result, which the next layer keeps anyway, and a number for each row."""
    tensors = drawn(sum(LONG[0]), (6, 2), (32, 32), dtype)
    inputs = [t.detach().requires_grad_() for t in tensors[:3]]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = lane_attention(*inputs, table_of(*LONG, None), None, None)
    found = [t.data_ptr() for t in kept]
    assert found[:3] == [t.data_ptr() for t in inputs]
    if not c_blocks.in_tiles(dtype):
        assert len(kept) == 3
    else:
        assert found[3:4] == [y.data_ptr()]
        assert [t.shape for t in kept[4:]] == [y.shape[:2]]


def test_without_a_bit_of_difference_for_bf16_without_gradients() -> None:
    tensors = drawn(sum(LONGER[0]), (6, 2), (32, 32), torch.bfloat16)
    with torch.no_grad():
        alone = lane_attention(*tensors[:3], table_of(*LONGER, None), None, None)
    assert torch.equal(alone, found(LONGER, None, tensors)[0])


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


@settings(max_examples=50, deadline=None)
@given(trees(), st.sampled_from([None, 1, 3, 7]))
def test_each_token_is_in_one_lane_behind_its_path(tree: Tree, window: int | None) -> None:
    """Of the tree as it is, and of one whose segments are cut, and stand together in runs."""
    for part in (256, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lanes, "_PART", part)
            _holds_each_token_once(table_of.__wrapped__(*tree, window), tree, window)


def _holds_each_token_once(table: LaneTable, tree: Tree, window: int | None) -> None:
    seen = visibility(*tree, window)
    tokens, keys = [], 0
    for first, last, known, first_range, last_range, before in table.runs.tolist():
        path = [token for part in table.ranges[first_range:last_range].tolist() for token in range(*part)]
        assert (len(path), before) == (known, keys)
        keys += known
        for start, stop in table.lanes[first:last].tolist():
            tokens += range(start, stop)
            own = list(range(start, stop))
            for token in (start, stop - 1):
                reach = [*path, *own[: token - start + 1]]
                assert reach[-(window or len(reach)) :] == seen[token].nonzero()[:, 0].tolist()
    assert sorted(tokens) == list(range(sum(tree[0])))
    assert table.keys == keys


def test_what_one_thread_does_is_a_quarter_of_a_long_lane_or_of_short_ones() -> None:
    long = table_of((4_000,), ((),), None)
    assert long.lanes.diff().flatten().tolist() == [1000] * 4
    assert long.lanes[0].tolist() == [3000, 4000]  # what takes longest comes first
    assert table_of((600,), ((),), None).lanes.diff().flatten().tolist() == [300, 300]
    branches = table_of((200, *(50,) * 16), ((), *((0,),) * 16), None)
    assert [last - first for first, last, *_ in branches.runs.tolist()] == [4, 4, 4, 4, 1]
    assert branches.keys == 4 * 200


def test_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(tree: Tree, dim: int = 16, dtype: torch.dtype = torch.float32) -> bool:
        q, k, v = (torch.zeros(1, 2, sum(tree[0]), dim, dtype=dtype) for _ in range(3))
        return takes(q, k, v, table_of(*tree, None))

    few, many = ((700, 30), ((), ())), ((900, 30), ((), ()))
    assert asked(few)
    assert asked(few, dtype=torch.bfloat16)
    assert not asked(many)
    assert asked(many, dtype=torch.bfloat16) == c_blocks.TILES
    monkeypatch.setattr(c_blocks, "TILES", False)
    assert not asked(many, dtype=torch.bfloat16)
    assert not asked(few, dim=24)
    assert not asked(few, dtype=torch.float64)
    monkeypatch.setattr("loratune.kernels.chosen.kernels_of", lambda _: Kernels(None, "none"))
    assert not asked(few)


def test_a_packed_row_goes_through_them(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = (t[None] for t in drawn(12, (4, 2), (16, 16), torch.float32))
    told: Any = {"segments": (5, 4, 3), "above": FRESH}
    called = []
    monkeypatch.setattr(c_blocks, "attend_forward", lambda *args: called.append(args) or (torch.zeros(12, 4, 16), None))
    y, _ = attention.packed_attention(torch.nn.Module(), q, k, v, None, **told)
    assert len(called) == 1
    assert y.shape == (1, 12, 4, 16)


def test_no_memory_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what training on less at once is for."""
    monkeypatch.setattr(c_blocks._library, "attend_forward_f32", lambda *_: 1)
    tensors = drawn(12, (4, 2), (16, 16), torch.float32)
    with torch.no_grad(), pytest.raises(MemoryError):
        lane_attention(*tensors[:3], table_of((5, 4, 3), FRESH, None), None, None)
