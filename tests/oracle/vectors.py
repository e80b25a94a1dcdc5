"""VeRA and (IA)³ written out slowly in float64, one row at a time; nothing here comes from the package under test.

    y = W x + bias + b ∘ (B (d ∘ (A x)))             VeRA, arXiv:2310.11454, equation 2
    y = l ∘ (W x + bias), or W (l ∘ x) + bias        (IA)³, arXiv:2205.05638, section 3.3

`weight` is the matrix (out, columns) over all inputs, x are its columns by position; of a convolution l has one number
for each channel, which all points of its kernel share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.oracle.lora_reference import Array


@dataclass(frozen=True)
class Vera:
    A: Array
    B: Array
    d: Array
    b: Array


def vera_forward(weight: Array, bias: Array, x: Array, vera: Vera) -> Array:
    return np.array([weight @ row + bias + vera.b * (vera.B @ (vera.d * (vera.A @ row))) for row in x])


def vera_gradients(weight: Array, x: Array, g: Array, vera: Vera) -> tuple[Array, Array, Array]:
    """By x, d and b, of a loss with ∂loss/∂y = g (rows, out)."""
    to_x = np.array([weight.T @ row + vera.A.T @ (vera.d * (vera.B.T @ (vera.b * row))) for row in g])
    to_d = sum((vera.A @ seen) * (vera.B.T @ (vera.b * row)) for seen, row in zip(x, g, strict=True))
    to_b = sum(row * (vera.B @ (vera.d * (vera.A @ seen))) for seen, row in zip(x, g, strict=True))
    return to_x, np.asarray(to_d), np.asarray(to_b)


def rescaled_forward(weight: Array, bias: Array, x: Array, factors: Array, *, on_input: bool) -> Array:
    if not on_input:
        return np.array([factors * (weight @ row + bias) for row in x])
    return np.array([weight @ (_spread(factors, weight) * row) + bias for row in x])


def rescaled_gradient(weight: Array, bias: Array, x: Array, g: Array, factors: Array, *, on_input: bool) -> Array:
    """By l."""
    if not on_input:
        return np.asarray(sum(row * (weight @ seen + bias) for seen, row in zip(x, g, strict=True)))
    by_column = sum((weight.T @ row) * seen for seen, row in zip(x, g, strict=True))
    return np.asarray(by_column).reshape(len(factors), -1).sum(1)


def _spread(factors: Array, weight: Array) -> Array:
    return np.repeat(factors, weight.shape[1] // len(factors))
