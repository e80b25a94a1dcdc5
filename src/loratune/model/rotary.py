"""Rotary position embedding (Su et al., arXiv:2104.09864, equation 34), the halves of a head turned together.

Three operations where the families' own code takes six, and only the angles, which all layers share, are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loratune.kernels import kernels_for


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x · cos + (-second half, first half of x) · sin.

    Args:
        x: (..., heads, dim); cos and sin: (..., 1, dim), perhaps of a finer dtype.

    Returns:
        Of x's dtype.
    """
    if not torch.is_grad_enabled():
        return _computed(x, cos, sin, kernels_for(x))
    y: Tensor = _Rotated.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


def _computed(x: Tensor, cos: Tensor, sin: Tensor, kernels: Any) -> Tensor:
    y: Tensor = _turned(x, cos, sin) if kernels is None else kernels.rotate(x, cos, sin)
    return y.to(x.dtype)  # some families have finer angles


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernels = kernels_for(x)
        return _computed(x, cos, sin, ctx.kernels)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        gx = _turned_back(gy, cos, sin) if ctx.kernels is None else ctx.kernels.rotate(gy, cos, sin, back=True)
        return gx.to(gy.dtype), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (x1, x2), (s1, s2) = x.chunk(2, -1), sin.chunk(2, -1)
    y = x * cos
    y1, y2 = y.chunk(2, -1)
    y1.addcmul_(x2, s1, value=-1)
    y2.addcmul_(x1, s2)
    return y


def _turned_back(gy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (g1, g2), (s1, s2) = gy.chunk(2, -1), sin.chunk(2, -1)
    gx = gy * cos
    gx1, gx2 = gx.chunk(2, -1)
    gx1.addcmul_(g2, s2)
    gx2.addcmul_(g1, s1, value=-1)
    return gx
