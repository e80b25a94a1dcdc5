"""Low-rank adaptation written out slowly in float64, one row and one number at a time.

Nothing here comes from the package under test: formulas are those of Hu et al. (arXiv:2106.09685), Kalajdzievski
(arXiv:2312.03732), Liu et al. (DoRA, arXiv:2402.09353), Meng et al. (PiSSA, arXiv:2404.02948) and Srivastava et al.
(dropout, 2014), gradients are derived by hand.

    y = W x + b + Σ u                        u = s · ((B A - B₀ A₀) (m ∘ x) + c)
    y = W x + b + Σ (g ∘ (W x + u) - W x)    DoRA: g = magnitude / ‖W + s · (B A - B₀ A₀)‖ by rows

m is each feature's dropout factor, 0 or 1 / (1 - p); A₀, B₀ and c are zero where an update has none. In gradients the
norm in g is a constant (arXiv:2402.09353, section 4.3).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Update:
    """One adapter on one layer: A (r, in), B (out, r), its scale, and the factors m (rows, in) of its dropout.

    Further c (out,), the magnitude (out,) of DoRA, and where A and B started, if the update counts from there.
    """

    A: Array
    B: Array
    scale: float
    mask: Array | None = None
    c: Array | None = None
    magnitude: Array | None = None
    start: tuple[Array, Array] | None = None

    def seen(self, x: Array, row: int) -> Array:
        return x if self.mask is None else np.asarray(x * self.mask[row])


@dataclass(frozen=True)
class Gradients:
    """∂loss by each tensor of one update; None for what it does not have."""

    A: Array
    B: Array
    c: Array | None
    magnitude: Array | None


def exact(tensor: Any) -> Array:
    """The values of a tensor of any floating dtype, without rounding."""
    return np.asarray(tensor.detach().cpu().double().numpy())


def scale(r: int, alpha: float, *, rslora: bool = False) -> float:
    return alpha / (r**0.5 if rslora else r)


def pattern_value(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The first pattern that matches `path` from its start or from a dot to its end decides."""
    starts = [0, *(i + 1 for i, character in enumerate(path) if character == ".")]
    for pattern, value in patterns.items():
        if any(re.compile(f"(?:{pattern})\\Z").match(path[start:]) for start in starts):
            return value
    return default


def _times(matrix: Array, vector: Array) -> Array:
    return np.array([math.fsum(float(a) * float(b) for a, b in zip(row, vector, strict=True)) for row in matrix])


def forward(W: Array, b: Array | None, x: Array, updates: Sequence[Update] = ()) -> Array:
    """x (rows, in) → (rows, out)."""
    stretches = [stretch(W, update) for update in updates]
    out = []
    for number, row in enumerate(x):
        Wx = _times(W, row)
        y = Wx if b is None else Wx + b
        for update, g in zip(updates, stretches, strict=True):
            u = term(update, update.seen(row, number))
            y = y + (u if g is None else g * (Wx + u) - Wx)
        out.append(y)
    return np.array(out).reshape(len(x), W.shape[0])


def term(update: Update, seen: Array) -> Array:
    """u = s · (B A x - B₀ A₀ x + c) for one row as the update sees it."""
    u = _times(update.B, _times(update.A, seen))
    if update.start is not None:
        A0, B0 = update.start
        u = u - _times(B0, _times(A0, seen))
    return np.asarray(update.scale * (u if update.c is None else u + update.c))


def stretch(W: Array, update: Update) -> Array | None:
    """g (out,) = magnitude / ‖W + ΔW‖ by rows from the dense matrix; a row of zeros has nothing to stretch."""
    if update.magnitude is None:
        return None
    lengths = [math.sqrt(math.fsum(value * value for value in row)) for row in W + dense(update)]
    return np.array([m / n if n else m for m, n in zip(update.magnitude, lengths, strict=True)])


def gradients(W: Array, x: Array, g: Array, updates: Sequence[Update]) -> tuple[Array, list[Gradients]]:
    """Of a loss with ∂loss/∂y = g (rows, out): ∂loss/∂x, and those of each update.

    With h = g, for DoRA h = stretch ∘ g, and sums over rows:
    ∂/∂x = Wᵀ g + Σ s · m ∘ ((B A - B₀ A₀)ᵀ h), for DoRA + Wᵀ (h - g)
    ∂/∂B = s · Σ h (A m∘x)ᵀ · ∂/∂A = s · Σ (Bᵀ h) (m∘x)ᵀ · ∂/∂c = s · Σ h · ∂/∂magnitude = Σ g ∘ (W x + u) / ‖W + ΔW‖
    """
    to_x = np.array([_times(W.T, row) for row in g])
    found = []
    for update in updates:
        stretched = stretch(W, update)
        to_A, to_B = np.zeros_like(update.A), np.zeros_like(update.B)
        to_c, to_magnitude = np.zeros(len(W)), np.zeros(len(W))
        for number in range(len(x)):
            seen = update.seen(x[number], number)
            h = g[number] if stretched is None else stretched * g[number]
            back = _times(update.B.T, h)
            to_A += update.scale * np.outer(back, seen)
            to_B += update.scale * np.outer(h, _times(update.A, seen))
            to_c += update.scale * h
            through = _times(update.A.T, back)
            if update.start is not None:
                through = through - _times(update.start[0].T, _times(update.start[1].T, h))
            through = update.scale * through
            to_x[number] += through if update.mask is None else through * update.mask[number]
            if stretched is not None:
                to_x[number] += _times(W.T, h - g[number])
                to_magnitude += g[number] * (_times(W, x[number]) + term(update, seen)) * _inverse_norms(W, update)
        found.append(
            Gradients(
                to_A,
                to_B,
                None if update.c is None else to_c,
                None if update.magnitude is None else to_magnitude,
            )
        )
    return to_x, found


def _inverse_norms(W: Array, update: Update) -> Array:
    one = stretch(W, replace(update, magnitude=np.ones(len(W))))
    assert one is not None
    return one


def dense(update: Update) -> Array:
    """s · (B A - B₀ A₀), number by number; for DoRA this is what is added before rows are stretched."""
    pairs = [(update.A, update.B, 1.0)]
    if update.start is not None:
        pairs.append((*update.start, -1.0))
    out, inner = len(update.B), update.A.shape[1]
    total = np.zeros((out, inner))
    for A, B, sign in pairs:
        total += sign * np.array([[math.fsum(row * column) for column in A.T] for row in B]).reshape(out, inner)
    return np.asarray(update.scale * total)


def delta(W: Array, update: Update) -> Array:
    """ΔW, of which W + ΔW is the merged weight: for DoRA g ∘ (W + s · B A) - W."""
    g = stretch(W, update)
    return dense(update) if g is None else np.asarray(g[:, None] * (W + dense(update)) - W)


def rounded(values: Array, dtype: str) -> Array:
    """To the nearest number of the format, ties to even, in one step; normal numbers only."""
    if dtype in ("float32", "float16"):
        return np.asarray(values.astype(dtype).astype(np.float64))
    assert dtype == "bfloat16"
    mantissa, exponent = np.frexp(values)
    return np.asarray(np.ldexp(np.rint(mantissa * 256.0), exponent - 8))


def merged(W: Array, updates: Sequence[Update], dtype: str) -> Array:
    total = W.copy()
    for update in updates:
        total = total + delta(W, update)
    return rounded(total, dtype)


def effective_rank(update: Update) -> float:
    """exp of the entropy of ΔW's singular values, from the dense matrix."""
    sigma = np.linalg.svd(dense(update), compute_uv=False)
    shares = [float(value / sigma.sum()) for value in sigma if value > 1e-12 * sigma[0]]
    return math.exp(-sum(share * math.log(share) for share in shares))


# -- the dropout counter ---------------------------------------------------------------------------------------------


def splitmix64(value: int) -> int:
    """Steele, Lea, Flood: "Fast splittable pseudorandom number generators" (2014)."""
    z = (value + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) % 2**64
    return z ^ z >> 31


def murmur_final(value: int) -> int:
    """The finaliser of MurmurHash3's 32-bit version (Appleby)."""
    value = ((value ^ value >> 16) * 0x85EBCA6B) % 2**32
    value = ((value ^ value >> 13) * 0xC2B2AE35) % 2**32
    return value ^ value >> 16


def keeps(token: int, feature: int, p: float, *, seed: int, step: int, layer: int) -> bool:
    """Whether one feature of one token survives dropout with probability p."""
    key = splitmix64(splitmix64(splitmix64(seed) ^ step) ^ layer)
    row = splitmix64(token ^ key) % 2**32
    column = splitmix64(feature ^ splitmix64(key)) % 2**32
    drawn = (murmur_final(row ^ column) + 2**31) % 2**32  # as the signed number it is compared as, from 0
    return drawn >= round(p * 2**32)


def dropout_factors(tokens: Sequence[int], width: int, p: float, *, seed: int, step: int, layer: int) -> Array:
    """m (tokens, width): 0 or 1 / (1 - p)."""
    kept = [[keeps(t, f, p, seed=seed, step=step, layer=layer) for f in range(width)] for t in tokens]
    return np.array(kept, dtype=np.float64).reshape(len(tokens), width) / (1.0 - p)
