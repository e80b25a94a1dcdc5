"""Attention over a tree of segments by the kernels in C, for tokens that see few others.

Each lane of each key head goes from its keys to its result in one piece, in fp32 (`c_attention.c`). Where tokens see
many, the matrix units of a processor make up for what products in bf16 write and read: `tree_attention`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from loratune.model.kernels import kernels_for
from loratune.model.lanes import LaneTable

# Keys that a token sees on average, up to which these kernels are the faster ones. Measured.
_FEW = 400
# What the kernels take whole vectors of.
_VECTOR = 16


def takes(query: Tensor, key: Tensor, value: Tensor, table: LaneTable) -> bool:
    """Whether the kernels are there for (batch, heads, tokens, dim), and faster."""
    if table.seen > _FEW * query.shape[2] or not query.dtype == key.dtype == value.dtype:
        return False
    whole = query.shape[-1] % _VECTOR == 0 and value.shape[-1] % _VECTOR == 0
    return whole and all(kernels_for(t) is not None for t in (query, key, value))


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
        alone: Tensor = kernels.attend_forward(*by_token, table, window, scale)  # type: ignore[union-attr]
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
        ctx.save_for_backward(q, k, v)
        ctx.kernels, ctx.told = kernels, (table, window, scale)
        found: Tensor = kernels.attend_forward(q, k, v, *ctx.told)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.kernels.attend_backward(gy, *ctx.saved_tensors, *ctx.told), None, None, None, None
