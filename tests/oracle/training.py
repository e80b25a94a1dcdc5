"""Training as a textbook writes it: row by row, weights W + s·BA made dense, torch's own AdamW and clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from loratune.data.render import Rendered
from tests.oracle.loss import step_loss


class _Adapted(torch.nn.Module):
    """The base with its weights replaced by W + s·BA in each forward pass; nothing of ours is in it."""

    def __init__(self, base: Any, pairs: dict[str, tuple[Tensor, Tensor]], scale: float) -> None:
        super().__init__()
        self.base, self.pairs, self.scale = base, pairs, scale
        self.transposed = {path: type(base.get_submodule(path)).__name__ == "Conv1D" for path in pairs}

    def __call__(self, **inputs: Any) -> Any:
        changed = {}
        for path, (A, B) in self.pairs.items():
            delta = self.scale * (B @ A)
            changed[f"{path}.weight"] = self.base.get_parameter(f"{path}.weight") + (
                delta.T if self.transposed[path] else delta
            )
        return functional_call(self.base, changed, kwargs=inputs)


def train(
    base: Any,
    pairs: dict[str, tuple[Tensor, Tensor]],
    scale: float,
    steps: Iterable[Sequence[Rendered]],
    rate: Callable[[int], float],
    *,
    clip: float,
    weight_decay: float,
) -> list[float]:
    """Train `pairs` (A, B by module path) in place in float64; returns the losses."""
    parameters = [tensor.requires_grad_(True) for pair in pairs.values() for tensor in pair]
    model = _Adapted(base, pairs, scale)
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=weight_decay)
    losses = []
    for number, rows in enumerate(steps):
        optimizer.zero_grad()
        loss = step_loss(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.param_groups[0]["lr"] = rate(number)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
