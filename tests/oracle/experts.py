"""Mixtures of experts written as separate linear layers, each with a low-rank term of its own, in float64.

A token x goes through the experts it was routed to: y = Σₖ wₖ · D(act(U(x))) with U and D the expert's two layers, each
W x + s · B (A x). Nothing is stacked, batched or sorted here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Layer:
    """One expert's layer: W (out, in), b (out,) or None, A (r, in), B (out, r)."""

    W: Tensor
    b: Tensor | None
    A: Tensor
    B: Tensor
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        y = self.W @ x + self.scale * (self.B @ (self.A @ x))
        return y if self.b is None else y + self.b


@dataclass
class Expert:
    up: Layer
    down: Layer


def mixture(
    experts: list[Expert], gate: Callable[[Tensor], Tensor], x: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """
    Args:
        x: (tokens, in). chosen, weights: (tokens, k), which experts, and how much of each.
        gate: what stands between the layers, for one vector.
    """
    rows = []
    for token in range(len(x)):
        row = torch.zeros(len(experts[0].down.W), dtype=torch.float64)
        for k in range(chosen.shape[1]):
            expert = experts[int(chosen[token, k])]
            row = row + weights[token, k] * expert.down(gate(expert.up(x[token])))
        rows.append(row)
    return torch.stack(rows)
