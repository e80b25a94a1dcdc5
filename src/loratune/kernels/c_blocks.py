"""The norm, the gated product, the rotary embedding, cross-entropy, attention and low-rank adaptation on a processor.

Each reads and writes once. The formulas are those of `norm`, `gated`, `rotary`, `loss`, `lane_attention` and
`lora.linear`; everything is computed in fp32 at least and rounded once, but for what goes into products in tiles, which
is rounded to bf16 before them.
Importing this compiles `c_blocks.c` where that has not been done: `chosen.kernels_for` says where that may be. A tensor
whose last dimension is not contiguous is copied first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loratune.kernels.adapted import Adapted
from loratune.kernels.c_build import library
from loratune.kernels.lanes import LaneTable

_library = library()
_library.compiler.restype = ctypes.c_char_p
# Whether attention of bf16 has the processor's matrix unit for its products.
TILES = bool(_library.tiles())
NAMED = f"kernels in C, compiled by {_library.compiler().decode()}{', with AMX' if TILES else ''}"
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_Number = ctypes.c_int64


def norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """w · x / √(mean x² + eps) and 1 / √(mean x² + eps).

    Args:
        x: (..., features) in fp32 or bf16; weight: (features,).

    Returns:
        (..., features) in x's dtype and (..., 1) in fp32.
    """
    x, w = x.contiguous(), weight.float().contiguous()
    y, inverse = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    _call("norm_forward", x, (x, w, y, inverse), _rows(x), eps)
    return y, inverse


def norm_backward(gy: Tensor, y: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of x, (..., features) in gy's dtype, from that of y and what `norm_forward` gave."""
    gy, y, w = gy.contiguous(), y.contiguous(), weight.float().contiguous()
    gx = torch.empty_like(gy)
    _call("norm_backward", gy, (gy, y, w, w.reciprocal(), inverse, gx), _rows(gy))
    return gx


def gated_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) · up, all (..., features); the activation is silu, gelu or gelu_tanh."""
    y = torch.empty(gate.shape, dtype=gate.dtype)
    gate, up = _flat(gate), _flat(up)
    _call(f"gated_forward_{activation}", gate, (gate, up, y), (gate.stride(0), up.stride(0), *_rows(gate)))
    return y


def gated_backward(gy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up from that of act(gate) · up, all (..., features)."""
    g_gate, g_up = (torch.empty(t.shape, dtype=t.dtype) for t in (gate, up))
    gy, gate, up = map(_flat, (gy, gate, up))
    steps = (gy.stride(0), gate.stride(0), up.stride(0))
    _call(f"gated_backward_{activation}", gate, (gy, gate, up, g_gate, g_up), (*steps, *_rows(gate)))
    return g_gate, g_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """x · cos + (-second half, first half of x) · sin, or with `back` the gradient of x from that of the result.

    Args:
        x: (..., heads, dim), heads and tokens in any order in memory; cos and sin: (..., 1, dim).

    Returns:
        Contiguous, in the dtype that x and cos have in common.
    """
    heads, dim = x.shape[-2:]
    dtype = torch.result_type(x, cos)
    y = torch.empty(x.shape, dtype=dtype)
    flat = x.reshape(-1, heads, dim)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    cos, sin = (_angles(angle, x, dtype) for angle in (cos, sin))
    sizes = (flat.stride(0), flat.stride(1), flat.shape[0], heads, dim // 2, int(back))
    _call(f"turn_{_NAMES[x.dtype]}", cos, (flat, cos, sin, y), sizes)
    return y


def _angles(angle: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Those of each token, one row after the other: as they are wherever they lie so, since each layer asks."""
    dim = x.shape[-1]
    if angle.dtype == dtype and angle.is_contiguous() and angle.numel() * x.shape[-2] == x.numel():
        return angle
    return angle.to(dtype).expand(*x.shape[:-2], 1, dim).reshape(-1, dim).contiguous()


def cross_entropy(logits: Tensor, targets: Tensor, times: Tensor | None, slope: Tensor) -> Tensor:
    """−times · log softmax(logits)[target] of each row, (N,) in fp32.

    Args:
        logits: (N, choices) in fp32 or bf16; targets: (N,), int64. times: (N,), 1 where there are none.
        slope: contiguous, of logits' shape and dtype; their derivative goes into it.

    Raises:
        IndexError: a target is none of the choices.
    """
    logits, targets = logits.contiguous(), targets.contiguous()
    often = None if times is None else times.float().contiguous()
    lost = logits.new_empty(len(logits), dtype=torch.float32)
    pointers = (None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (logits, targets, often, slope, lost))
    failed = getattr(_library, f"cross_entropy_{_NAMES[logits.dtype]}")(*pointers, *map(_Number, logits.shape))
    if failed == 2:
        raise IndexError(f"a target is none of the {logits.shape[1]} choices")
    if failed:
        raise MemoryError("no room for the probabilities of a row")
    return lost


class _Work(ctypes.Structure):
    """`work` of c_lanes.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("runs", "lanes", "ranges")),
        *((name, _Number) for name in ("number", "tokens", "heads", "groups", "dim", "value_dim", "window")),
        ("scale", ctypes.c_float),
    )


class _Steps(ctypes.Structure):
    """`steps` of c_lanes.c: elements from token to token and from head to head."""

    _fields_ = (("token", _Number), ("head", _Number))


def attend_forward(
    q: Tensor, k: Tensor, v: Tensor, table: LaneTable, window: int | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """softmax(s · Q Kᵀ + mask) V, each lane over the keys of its path and its own up to itself.

    Args:
        q: (tokens, heads, dim); k and v: (tokens, kv heads, their dim), each for heads // kv heads in turn; dims are
            multiples of 16.

    Returns:
        (tokens, heads, v's dim), and where products are in bf16 log2 of Σ exp(s · q · k), (tokens, heads) in fp32.
    """
    y = q.new_empty(*q.shape[:2], v.shape[2])
    work = _work(q, k, v, table, window, scale)
    if not in_tiles(q.dtype):
        _attend(f"attend_forward_{_NAMES[q.dtype]}", (q, k, v, y), (), work)
        return y, None
    totals = q.new_empty(q.shape[:2], dtype=torch.float32)
    _attend("attend_forward_tiles", (q, k, v, y), (totals,), work)
    return y, totals


def attend_backward(
    gy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    totals: Tensor | None,
    table: LaneTable,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, in their shapes, from that of y; y and totals are what `attend_forward` gave."""
    gq, gk, gv = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
    sums = torch.empty((k.shape[0] + table.keys) * k.shape[1] * (k.shape[2] + v.shape[2]), dtype=torch.float32)
    work = _work(q, k, v, table, window, scale)
    if totals is None:
        _attend(f"attend_backward_{_NAMES[q.dtype]}", (gy, q, k, v, gq, gk, gv), (sums,), work)
    else:
        _attend("attend_backward_tiles", (gy, q, k, v, y, gq, gk, gv), (totals, sums), work)
    return gq, gk, gv


def in_tiles(dtype: torch.dtype) -> bool:
    """Whether products of attention are in bf16, by the processor's matrix unit, rather than in fp32."""
    return TILES and dtype == torch.bfloat16


class _Factors(ctypes.Structure):
    """`factors` of c_products.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "w")),
        *((name, _Number) for name in ("x_row", "w_row", "inner", "turned")),
    )


def sum_of_products(products: Sequence[tuple[Tensor, Tensor]], scale: float, into: Tensor | None) -> Tensor:
    """scale · Σ x w of (rows, inner) and (inner, columns), or that added to `into`; rounded once; in bf16 by tiles.

    Args:
        products: pairs of x, whose rows are contiguous, and w, whose rows are, or its columns.
        into: (rows, columns) with contiguous rows.
    """
    (x, w), *_ = products
    y = x.new_empty(len(x), w.shape[1]) if into is None else into
    told = []
    for x, w in products:
        turned = w.stride(1) != 1
        told.append(_Factors(x.data_ptr(), w.data_ptr(), x.stride(0), w.stride(int(turned)), x.shape[1], int(turned)))
    sizes = (y.stride(0), *y.shape)
    failed = _library.sum_of_products(
        (_Factors * len(told))(*told), _Number(len(told)), ctypes.c_void_p(y.data_ptr()), *map(_Number, sizes),
        ctypes.c_float(scale), int(into is not None),
    )  # fmt: skip
    if failed:
        raise MemoryError("no room for the factors of a product")
    if into is not None:
        torch.autograd.graph.increment_version(into)
    return y


def product_over_rows(u: Tensor, v: Tensor) -> Tensor:
    """uᵀ v of (rows, m) and (rows, n), (m, n) in fp32; of bf16 whose rows are contiguous."""
    y = u.new_empty(u.shape[1], v.shape[1], dtype=torch.float32)
    sides = [(ctypes.c_void_p(t.data_ptr()), _Number(t.stride(0)), _Number(t.shape[1])) for t in (u, v)]
    if _library.product_over_rows(*sides[0], *sides[1], _Number(len(u)), ctypes.c_void_p(y.data_ptr())):
        raise MemoryError("no room for the factors of a product")
    return y


class _Projection(ctypes.Structure):
    """`projection` of c_low_rank.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "a", "b", "y", "ga", "gb")),
        *((name, _Number) for name in ("weight_row", "by_columns", "out", "r", "fine_a", "fine_b", "y_row")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("rounded_a", "rounded_b")),
        ("first", _Number),
    )


def low_rank_forward(x: Tensor, projections: Sequence[Adapted]) -> tuple[list[Tensor], Tensor]:
    """W x + b + s B A x of each, and s A x of all beside each other, (rows, Σ r).

    Args:
        x: (rows, in_features) in bf16, with contiguous rows.
    """
    ys = [x.new_empty(len(x), len(p.B)) for p in projections]
    h = x.new_empty(len(x), sum(len(p.A) for p in projections))
    _low_rank("low_rank_forward", x, [_told(p, y) for p, y in zip(projections, ys, strict=True)], h)
    return ys, h


def low_rank_backward(
    x: Tensor,
    h: Tensor,
    grads: Sequence[Tensor],
    projections: Sequence[Adapted],
    wanted: Sequence[tuple[bool, bool]],
    *,
    wants_x: bool,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """The gradients of x, in bf16, and of each A and B, in fp32, from those of what `low_rank_forward` gave.

    Args:
        grads: (rows, out_features) each, with contiguous rows. wanted: whether that of A, and that of B, is.
    """

    def room(t: Tensor, wants: bool) -> Tensor | None:
        return t.new_empty(t.shape, dtype=torch.float32) if wants else None

    gx = x.new_empty(x.shape) if wants_x else None
    gAs = [room(p.A, A) for p, (A, _) in zip(projections, wanted, strict=True)]
    gBs = [room(p.B, B) for p, (_, B) in zip(projections, wanted, strict=True)]
    told = [_told(*each) for each in zip(projections, grads, gAs, gBs, strict=True)]
    _low_rank("low_rank_backward", x, told, h, None if gx is None else ctypes.c_void_p(gx.data_ptr()))
    return gx, gAs, gBs


def _told(p: Adapted, y: Tensor, gA: Tensor | None = None, gB: Tensor | None = None) -> _Projection:
    weight, A, B, scale, bias = p
    by_columns = weight.stride(1) != 1
    return _Projection(
        weight.data_ptr(), *(None if t is None else t.data_ptr() for t in (bias, A, B, y, gA, gB)),
        weight.stride(int(by_columns)), by_columns, *B.shape, A.dtype == torch.float32, B.dtype == torch.float32,
        y.stride(0), scale,
    )  # fmt: skip


def _low_rank(name: str, x: Tensor, told: Sequence[_Projection], h: Tensor, *more: Any) -> None:
    sizes = (_Number(len(told)), ctypes.c_void_p(x.data_ptr()), _Number(x.stride(0)), *map(_Number, x.shape))
    if getattr(_library, name)((_Projection * len(told))(*told), *sizes, ctypes.c_void_p(h.data_ptr()), *more):
        raise MemoryError("no room for the factors of a product")


def _work(q: Tensor, k: Tensor, v: Tensor, table: LaneTable, window: int | None, scale: float) -> _Work:
    sizes = (len(table.runs), *k.shape[:2], q.shape[1] // k.shape[1], k.shape[2], v.shape[2], window or 0)
    return _Work(*(part.data_ptr() for part in (table.runs, table.lanes, table.ranges)), *sizes, scale)


def _attend(name: str, tensors: Sequence[Tensor], room: Sequence[Tensor], work: _Work) -> None:
    told: list[Any] = []
    kept = [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]
    for t in kept:
        told += [ctypes.c_void_p(t.data_ptr()), _Steps(t.stride(0), t.stride(1))]
    told += [ctypes.c_void_p(t.data_ptr()) for t in room]
    if getattr(_library, name)(*told, ctypes.byref(work)):
        raise MemoryError("no room for the scores of a few queries")


def _call(name: str, kind: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int], *numbers: float) -> None:
    """A function of the library, in `kind`'s dtype; tensors as their first elements' addresses."""
    function = getattr(_library, f"{name}_{_NAMES[kind.dtype]}")
    function(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
        *map(_Number, sizes),
        *map(ctypes.c_float, numbers),
    )


def _rows(x: Tensor) -> tuple[int, int]:
    return x.numel() // max(1, x.shape[-1]), x.shape[-1]


def _flat(x: Tensor) -> Tensor:
    """(rows, features), halves of wider rows as they lie."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()
