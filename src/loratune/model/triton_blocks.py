"""The fused blocks' formulas as Triton kernels, for CUDA: one pass over memory each, in fp32 and rounded once.

The formulas are those of `norm`, `gated` and `rotary`, which say where they come from. This module imports triton, so
that it is itself imported only where something runs on such a device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 1024


@triton.jit
def _rms_norm(x, weight, y, inverse, features, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < features
    values = tl.load(x + row * features + column, inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    inv = 1.0 / tl.sqrt(tl.sum(values * values) / features + eps)
    tl.store(inverse + row, inv)
    tl.store(y + row * features + column, (values * inv * factor).to(y.dtype.element_ty), inside)


@triton.jit
def _rms_norm_backward(gy, y, weight, inverse, gx, features, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < features
    grad = tl.load(gy + row * features + column, inside, other=0.0).to(tl.float32)
    normal = tl.load(y + row * features + column, inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, inside, other=1.0).to(tl.float32)
    inner = tl.sum(grad * normal) / features
    found = (grad * factor - normal / factor * inner) * tl.load(inverse + row)
    tl.store(gx + row * features + column, found.to(gx.dtype.element_ty), inside)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """act(x) and its derivative."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        value = x * s
        slope = s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "gelu":
        phi = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * phi
        slope = phi + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        # tanh(z) = 2 σ(2z) - 1
        t = 2.0 * tl.sigmoid(2.0 * 0.7978845608028654 * (x + 0.044715 * x * x * x)) - 1.0
        value = 0.5 * x * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 3 * 0.044715 * x * x)
    return value, slope


@triton.jit
def _gated(gate, up, y, number, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < number
    value, _ = _activated(tl.load(gate + at, inside, other=0.0).to(tl.float32), ACTIVATION)
    tl.store(y + at, (value * tl.load(up + at, inside, other=0.0).to(tl.float32)).to(y.dtype.element_ty), inside)


@triton.jit
def _gated_backward(gy, gate, up, ggate, gup, number, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < number
    grad = tl.load(gy + at, inside, other=0.0).to(tl.float32)
    value, slope = _activated(tl.load(gate + at, inside, other=0.0).to(tl.float32), ACTIVATION)
    other = tl.load(up + at, inside, other=0.0).to(tl.float32)
    tl.store(ggate + at, (grad * other * slope).to(ggate.dtype.element_ty), inside)
    tl.store(gup + at, (grad * value).to(gup.dtype.element_ty), inside)


@triton.jit
def _rotated(x, cos, sin, y, heads, half, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """One head of one token; backward the transposed turn."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < half
    left, angle = row * 2 * half + column, row // heads * 2 * half + column
    x1 = tl.load(x + left, inside, other=0.0).to(tl.float32)
    x2 = tl.load(x + left + half, inside, other=0.0).to(tl.float32)
    c1 = tl.load(cos + angle, inside, other=0.0).to(tl.float32)
    c2 = tl.load(cos + angle + half, inside, other=0.0).to(tl.float32)
    s1 = tl.load(sin + angle, inside, other=0.0).to(tl.float32)
    s2 = tl.load(sin + angle + half, inside, other=0.0).to(tl.float32)
    if BACKWARD:
        y1 = x1 * c1 + x2 * s2
        y2 = x2 * c2 - x1 * s1
    else:
        y1 = x1 * c1 - x2 * s1
        y2 = x2 * c2 + x1 * s2
    tl.store(y + left, y1.to(y.dtype.element_ty), inside)
    tl.store(y + left + half, y2.to(y.dtype.element_ty), inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed x (..., features) and 1 / rms (..., 1) in fp32."""
    x = x.contiguous()
    y, inverse = torch.empty_like(x), torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    features = x.shape[-1]
    with torch.cuda.device_of(x):
        _rms_norm[(inverse.numel(),)](x, weight, y, inverse, features, eps, BLOCK=triton.next_power_of_2(features))
    return y, inverse


def rms_norm_backward(gy: Tensor, y: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of x, from that of y and what the forward pass gave."""
    gy, gx, features = gy.contiguous(), torch.empty_like(y), y.shape[-1]
    block = triton.next_power_of_2(features)
    with torch.cuda.device_of(gy):
        _rms_norm_backward[(inverse.numel(),)](gy, y, weight, inverse, gx, features, BLOCK=block)
    return gx


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) · up."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    with torch.cuda.device_of(gate):
        _gated[_grid(y)](gate, up, y, y.numel(), ACTIVATION=activation, BLOCK=_ELEMENTS)
    return y


def gated_backward(gy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    gy, gate, up = gy.contiguous(), gate.contiguous(), up.contiguous()
    ggate, gup = torch.empty_like(gate), torch.empty_like(up)
    with torch.cuda.device_of(gy):
        _gated_backward[_grid(gy)](gy, gate, up, ggate, gup, gy.numel(), ACTIVATION=activation, BLOCK=_ELEMENTS)
    return ggate, gup


def rotated(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool = False) -> Tensor:
    """x (..., heads, dim) turned by angles (..., 1, dim); `backward` gives the gradient of x for that of the result."""
    angles = (*x.shape[:-2], 1, x.shape[-1])
    x, cos, sin = x.contiguous(), cos.expand(angles).contiguous(), sin.expand(angles).contiguous()
    y, half = torch.empty_like(x), x.shape[-1] // 2
    rows = x.numel() // x.shape[-1]
    block = triton.next_power_of_2(half)
    with torch.cuda.device_of(x):
        _rotated[(rows,)](x, cos, sin, y, x.shape[-2], half, BACKWARD=backward, BLOCK=block)
    return y


def _grid(tensor: Tensor) -> tuple[Any, ...]:
    return (triton.cdiv(tensor.numel(), _ELEMENTS),)
