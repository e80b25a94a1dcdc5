"""Kernels in Triton for the norm, the gated product and the rotary embedding, each of which reads and writes once.

The formulas are those of `norm`, `gated` and `rotary`; everything is computed in fp32 and rounded once. Importing this
imports Triton, which is no dependency: `chosen.kernels_for` says where that may be done. A tensor whose last
dimension is not contiguous is copied first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NAMED = f"kernels in Triton {triton.__version__}"
# Elements that one program takes of a tensor without rows that belong together.
_TILE = 1024
_ROOT_HALF = tl.constexpr(0.5**0.5)
_TWICE_ROOT_2_OVER_PI = tl.constexpr(2 * (2 / math.pi) ** 0.5)
_ROOT_1_OVER_2_PI = tl.constexpr((0.5 / math.pi) ** 0.5)
_CUBIC = tl.constexpr(0.044715)


def _kernel(function: Callable[..., Any]) -> Any:
    """`triton.jit`, whose own type says nothing. It reads annotations too, and knows no names in them but Triton's."""
    return triton.jit(function)


@_kernel
def _norm_forward(
    x: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    inverse: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    exact = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    # Rounded as IEEE says: a norm is compared with its family's, which is off by a few roundings at most.
    scale = tl.math.div_rn(1.0, tl.math.sqrt_rn(tl.sum(exact * exact, 1) / width + eps))
    normal = exact * scale[:, None] * w[None, :]
    tl.store(y + at, normal.to(y.dtype.element_ty), mask=inside)
    tl.store(inverse + row, scale, mask=row < rows)


@_kernel
def _norm_backward(
    gy: tl.tensor,
    y: tl.tensor,
    weight: tl.tensor,
    inverse: tl.tensor,
    gx: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    grad = tl.load(gy + at, mask=inside, other=0.0).to(tl.float32)
    normal = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=column < width, other=1.0).to(tl.float32)
    scale = tl.load(inverse + row, mask=row < rows, other=0.0)
    inner = tl.sum(grad * normal, 1) / width
    found = (grad * w[None, :] - normal / w[None, :] * inner[:, None]) * scale[:, None]
    tl.store(gx + at, found.to(gx.dtype.element_ty), mask=inside)


@_kernel
def _active(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """act(x) and its derivative, of fp32."""
    if ACTIVATION == "silu":
        share = tl.sigmoid(x)
        slope = share * (1.0 - share)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 is σ(2u), which keeps its digits where 1 + tanh u loses them.
        share = tl.sigmoid((x + x * x * x * _CUBIC) * _TWICE_ROOT_2_OVER_PI)
        slope = share * (1.0 - share) * (x * x * _CUBIC * 3.0 + 1.0) * _TWICE_ROOT_2_OVER_PI
    else:
        share = 0.5 * (1.0 + tl.erf(x * _ROOT_HALF))
        slope = tl.exp(x * x * -0.5) * _ROOT_1_OVER_2_PI
    return x * share, share + x * slope


@_kernel
def _gated_forward(
    gate: tl.tensor,
    up: tl.tensor,
    y: tl.tensor,
    gate_row: tl.tensor,
    up_row: tl.tensor,
    width: tl.tensor,
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
    g = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    active, _ = _active(g, ACTIVATION)
    tl.store(y + row * width + column, (active * u).to(y.dtype.element_ty), mask=inside)


@_kernel
def _gated_backward(
    gy: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    g_gate: tl.tensor,
    g_up: tl.tensor,
    gy_row: tl.tensor,
    gate_row: tl.tensor,
    up_row: tl.tensor,
    width: tl.tensor,
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
    grad = tl.load(gy + row * gy_row + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    active, slope = _active(g, ACTIVATION)
    at = row * width + column
    tl.store(g_gate + at, (grad * u * slope).to(g_gate.dtype.element_ty), mask=inside)
    tl.store(g_up + at, (grad * active).to(g_up.dtype.element_ty), mask=inside)


@_kernel
def _turn(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    y: tl.tensor,
    token_step: tl.tensor,
    head_step: tl.tensor,
    heads: tl.tensor,
    half: tl.tensor,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    real, angle = column < half, token * 2 * half + column
    c1 = tl.load(cos + angle, mask=real, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos + angle + half, mask=real, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + angle, mask=real, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin + angle + half, mask=real, other=0.0).to(tl.float32)[None, :]
    inside = (head < heads)[:, None] & real[None, :]
    source = x + token * token_step + head.to(tl.int64)[:, None] * head_step + column[None, :]
    x1 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        y1, y2 = x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
    else:
        y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    target = y + ((token * heads + head.to(tl.int64)) * 2 * half)[:, None] + column[None, :]
    tl.store(target, y1.to(y.dtype.element_ty), mask=inside)
    tl.store(target + half, y2.to(y.dtype.element_ty), mask=inside)


def in_tiles(_: torch.dtype) -> bool:
    """Whether there are products in tiles: cuBLAS has them."""
    return False


def norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """w · x / √(mean x² + eps) and 1 / √(mean x² + eps).

    Args:
        x: (..., features) in fp32, bf16 or fp16; weight: (features,).

    Returns:
        (..., features) in x's dtype and (..., 1) in fp32.
    """
    x, weight = x.contiguous(), weight.contiguous()
    y, inverse = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    shape = _rows(x)
    with torch.cuda.device_of(x):
        _norm_forward[shape.pop("grid")](x, weight, y, inverse, inverse.numel(), x.shape[-1], eps, **shape)
    return y, inverse


def norm_backward(gy: Tensor, y: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of x, (..., features) in gy's dtype, from that of y and what `norm_forward` gave."""
    gy, y, weight = gy.contiguous(), y.contiguous(), weight.contiguous()
    gx, shape = torch.empty_like(gy), _rows(gy)
    with torch.cuda.device_of(gy):
        _norm_backward[shape.pop("grid")](gy, y, weight, inverse, gx, inverse.numel(), y.shape[-1], **shape)
    return gx


def _rows(x: Tensor) -> dict[str, Any]:
    """Whole rows in one program, several where they are short (the norms of heads)."""
    width = triton.next_power_of_2(x.shape[-1])
    together = max(1, 2048 // width)
    return {
        "grid": (triton.cdiv(x.numel() // x.shape[-1], together),),
        "ROWS": together,
        "WIDTH": width,
        "num_warps": 4 if width <= 2048 else 8 if width <= 8192 else 16,
    }


def gated_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) · up, all (..., features); the activation is silu, gelu or gelu_tanh."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    (gate, up), width = map(_flat, (gate, up)), gate.shape[-1]
    with torch.cuda.device_of(gate):
        _gated_forward[_tiles(gate)](gate, up, y, gate.stride(0), up.stride(0), width, activation, _TILE)
    return y


def gated_backward(gy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up from that of act(gate) · up, all (..., features)."""
    g_gate, g_up = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (gate, up))
    gy, gate, up = map(_flat, (gy, gate, up))
    steps = (gy.stride(0), gate.stride(0), up.stride(0))
    with torch.cuda.device_of(gate):
        _gated_backward[_tiles(gate)](gy, gate, up, g_gate, g_up, *steps, gate.shape[-1], activation, _TILE)
    return g_gate, g_up


def _flat(x: Tensor) -> Tensor:
    """(rows, features), halves of wider rows as they lie."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _tiles(x: Tensor) -> tuple[int, int]:
    return x.shape[0], triton.cdiv(x.shape[1], _TILE)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """x · cos + (-second half, first half of x) · sin, or with `back` the gradient of x from that of the result.

    Args:
        x: (..., heads, dim), heads and tokens in any order in memory; cos and sin: (..., 1, dim).

    Returns:
        Contiguous, in the dtype that x and cos have in common.
    """
    heads, dim = x.shape[-2:]
    y = torch.empty(x.shape, dtype=torch.result_type(x, cos), device=x.device)
    flat = x.reshape(-1, heads, dim)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    cos, sin = (angle.expand(*x.shape[:-2], 1, dim).reshape(-1, dim).contiguous() for angle in (cos, sin))
    half = triton.next_power_of_2(dim // 2)
    together = min(triton.next_power_of_2(heads), max(1, _TILE // half))
    grid = (flat.shape[0], triton.cdiv(heads, together))
    with torch.cuda.device_of(x):
        _turn[grid](flat, cos, sin, y, flat.stride(0), flat.stride(1), heads, dim // 2, back, together, half)
    return y
