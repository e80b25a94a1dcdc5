"""FlexAttention over a tree: its mask pair by pair, its blocks, and its results (gradients need a GPU)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratune.model import flex_attention as flex
from loratune.model.attention import packed_attention
from loratune.model.flex_attention import block_mask_of, can_flex, flex_tree_attention, sight_of
from tests.oracle.attention import Above, dense, trees, visible

CPU = torch.device("cpu")
Tree = tuple[tuple[int, ...], Above]


def mask_of(tree: Tree, window: int | None, size: int) -> flex.BlockMask:
    found = block_mask_of(*tree, window, CPU, size)
    assert found is not None
    return found


@settings(max_examples=60, deadline=None)
@given(trees(), st.sampled_from([None, 1, 3, 7]), st.sampled_from([2, 4, 16]))
def test_what_is_seen_and_which_blocks_are_computed(tree: Tree, window: int | None, size: int) -> None:
    seen, mask = visible(*tree, window), mask_of(tree, window, size)
    tokens = len(seen)
    i, j = torch.meshgrid(torch.arange(tokens), torch.arange(tokens), indexing="ij")
    zero = torch.tensor(0)
    assert torch.equal(mask.mask_mod(zero, zero, i, j), seen)
    partial, whole = (_blocks(*listed) for listed in _lists(mask))
    assert not (partial & whole).any()
    for a in range(len(partial)):
        for b in range(len(partial)):
            pairs = seen[a * size : (a + 1) * size, b * size : (b + 1) * size]
            assert not whole[a, b] or pairs.all()
            assert partial[a, b] or whole[a, b] or not pairs.any()


def _lists(mask: flex.BlockMask) -> list[tuple[Tensor, Tensor]]:
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    return [(mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)]


def _blocks(number: Tensor, indices: Tensor) -> Tensor:
    found = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, (count, listed) in enumerate(zip(number[0, 0].tolist(), indices[0, 0].tolist(), strict=True)):
        found[row, listed[:count]] = True
    return found


def test_long_rows_are_mostly_whole_blocks_or_none() -> None:
    partial, whole = (_blocks(*listed) for listed in _lists(mask_of(((1024, 1024), ((), ())), None, 128)))
    assert (int(partial.sum()), int(whole.sum())) == (16, 2 * 28)


def test_a_window_leaves_blocks_out() -> None:
    partial, whole = (_blocks(*listed) for listed in _lists(mask_of(((2048,), ((),)), 256, 128)))
    assert int((partial | whole).sum()) < 3 * 16


def test_a_family_apart_is_none() -> None:
    """Of a segment whose descendants do not follow it directly no interval says who sees it."""
    assert sight_of((3, 4, 5), ((), (), (0,))) is None
    assert block_mask_of((3, 4, 5), ((), (), (0,)), None, CPU) is None
    assert sight_of((3, 4, 5), ((), (0,), ())) is not None


@settings(max_examples=20, deadline=None)
@given(trees(), st.sampled_from([None, 3]))
def test_output(tree: Tree, window: int | None) -> None:
    tokens = sum(tree[0])
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(heads, tokens, 16) for heads in (6, 2, 2))
    found = flex_tree_attention(q[None], k[None], v[None], mask_of(tree, window, 16), None)
    expected = dense(q.double(), k.double(), v.double(), *tree, window)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_what_the_kernel_does_not_take() -> None:
    query = torch.randn(1, 4, 8, 64)
    assert not can_flex(query, query, 0.0)  # on a CPU the lanes are faster
    if torch.cuda.is_available():
        query = query.cuda()
        assert can_flex(query, query, 0.0)
        assert not can_flex(query, query, 0.1)
        assert not can_flex(query[..., :8], query[..., :8], 0.0)
        assert not can_flex(query.double(), query.double(), 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_on_the_device(dtype: torch.dtype, window: int | None) -> None:
    segments, above = (150, 40, 300, 61), ((), (0,), (0,), ())
    torch.manual_seed(0)
    exact = [torch.randn(h, sum(segments), 64, dtype=torch.float64, requires_grad=True) for h in (6, 2, 2)]
    inputs = [t.detach().to("cuda", dtype)[None].requires_grad_() for t in exact]
    found, _ = packed_attention(torch.nn.Module(), *inputs, None, sliding_window=window, segments=segments, above=above)
    expected = dense(*exact, segments, above, window)
    grad = torch.randn_like(expected)
    mine = (found, *torch.autograd.grad(found, inputs, grad.to("cuda", dtype)[None]))
    right = (expected, *torch.autograd.grad(expected, exact, grad))
    allowed = 2e-3 if dtype == torch.float32 else 2e-2  # fp32 products may round to TF32
    for a, b in zip(mine, right, strict=True):
        assert (a[0].double().cpu() - b).norm() <= allowed * b.norm()
