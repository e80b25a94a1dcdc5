"""Training and evaluation modes of an adapted model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def adapter_training(model: nn.Module) -> bool:
    """Training mode, but for the base's own dropout, which stays off; returns whether the base has any.

    Its masks would come from a generator's state, so that a step's result would depend on how it is split. The
    adapter's dropout is counted from the tokens instead and stays on.
    """
    model.train()
    found = False
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            found = found or module.p > 0
            module.eval()
        elif type(module).__name__.endswith("Attention"):
            # Attention drops probabilities itself in training mode; its projections may have adapters and stay in it.
            module.training = False
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; after it every module is in its own mode again, not all in one."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
