"""Attention over a tree of segments by the kernels in C.

Some lanes behind one path, or a part of a long one, go from their keys to their results in one piece for each key
head: in bf16 with the products of a processor's
matrix unit where it has one (`c_tile_attention.c`), else in fp32 (`c_attention.c`). The latter is for tokens that see
few others: where they see many, torch's products are faster, in spite of what they write and read (`tree_attention`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from loratune.kernels import LaneTable, kernels_for

# Keys that a token sees on average, up to which products in fp32 here are the faster ones. Measured.
_FEW = 400
# What the kernels take whole vectors of.
_VECTOR = 16


def takes(query: Tensor, key: Tensor, value: Tensor, table: LaneTable) -> bool:
    """Whether the kernels are there for (batch, heads, tokens, dim), and faster."""
    if not query.dtype == key.dtype == value.dtype or query.shape[-1] % _VECTOR or value.shape[-1] % _VECTOR:
        return False
    kernels, *others = (kernels_for(t) for t in (query, key, value))
    if kernels is None or None in others:
        return False
    return table.seen <= _FEW * query.shape[2] or bool(kernels.in_tiles(query.dtype))


def lane_attention(
    query: Tensor, key: Tensor, value: Tensor, table: LaneTable, window: int | None, scale: float | None
) -> Tensor:
    """softmax(s · Q Kᵀ + mask) V over the paths that `table` was made of.

    Args:
        query: (heads, tokens, dim); key and value: (kv heads, tokens, dim), each kv head for heads // kv heads in turn.
        scale: s; 1 / √dim when None.

    Returns:
        (tokens, heads, value's dim).
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    kernels = kernels_for(query)
    by_token = [_alone(tensor).transpose(0, 1) for tensor in (query, key, value)]
    if not torch.is_grad_enabled():
        alone: Tensor = kernels.attend_forward(*by_token, table, window, scale)[0]  # type: ignore[union-attr]
        return alone
    output: Tensor = _LaneAttention.apply(*by_token, table, window, scale, kernels)  # type: ignore[no-untyped-call]
    return output


def _alone(tensor: Tensor) -> Tensor:
    """A copy of what is a part of something larger, which would be kept with it until the backward pass."""
    part = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.itemsize
    return tensor.transpose(0, 1).contiguous().transpose(0, 1) if part else tensor


class _LaneAttention(torch.autograd.Function):
    """Of (tokens, heads, dim)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: LaneTable, window: int | None, scale: float, kernels: Any
    ) -> Tensor:
        ctx.kernels, ctx.told = kernels, (table, window, scale)
        y: Tensor
        y, totals = kernels.attend_forward(q, k, v, *ctx.told)
        ctx.save_for_backward(q, k, v, *((None, None) if totals is None else (y, totals)))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.kernels.attend_backward(gy, *ctx.saved_tensors, *ctx.told), None, None, None, None
