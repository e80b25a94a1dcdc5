"""Low-rank adaptation written out slowly in float64, one row and one number at a time.

Nothing here comes from the package under test: formulas are those of Hu et al. (arXiv:2106.09685), Kalajdzievski
(arXiv:2312.03732) and Srivastava et al. (dropout, 2014), gradients are derived by hand.

    y = W x + b + Σ s · B A (m ∘ x)        m: each feature's factor, 0 or 1 / (1 - p)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Update:
    """One adapter on one layer: A (r, in), B (out, r), its scale, and the factors m (rows, in) of its dropout."""

    A: Array
    B: Array
    scale: float
    mask: Array | None = None

    def seen(self, x: Array, row: int) -> Array:
        return x if self.mask is None else np.asarray(x * self.mask[row])


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
    out = []
    for number, row in enumerate(x):
        y = _times(W, row)
        if b is not None:
            y = y + b
        for update in updates:
            y = y + update.scale * _times(update.B, _times(update.A, update.seen(row, number)))
        out.append(y)
    return np.array(out).reshape(len(x), W.shape[0])


def gradients(W: Array, x: Array, g: Array, updates: Sequence[Update]) -> tuple[Array, list[tuple[Array, Array]]]:
    """Of a loss with ∂loss/∂y = g (rows, out): ∂loss/∂x, and (∂loss/∂A, ∂loss/∂B) of each update.

    ∂/∂x = Wᵀ g + Σ s · m ∘ (Aᵀ Bᵀ g) · ∂/∂B = s · Σ g (A m∘x)ᵀ · ∂/∂A = s · Σ (Bᵀ g) (m∘x)ᵀ, sums over rows.
    """
    to_x = np.array([_times(W.T, row) for row in g])
    factors = []
    for update in updates:
        to_A, to_B = np.zeros_like(update.A), np.zeros_like(update.B)
        for number in range(len(x)):
            seen = update.seen(x[number], number)
            back = _times(update.B.T, g[number])
            to_A += update.scale * np.outer(back, seen)
            to_B += update.scale * np.outer(g[number], _times(update.A, seen))
            through = update.scale * _times(update.A.T, back)
            to_x[number] += through if update.mask is None else through * update.mask[number]
        factors.append((to_A, to_B))
    return to_x, factors


def dense(update: Update) -> Array:
    """ΔW = s · B A, number by number."""
    return np.array([[update.scale * math.fsum(row * column) for column in update.A.T] for row in update.B])


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
        total = total + dense(update)
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
