"""What TIES does to the entries of updates (Yadav et al., arXiv:2306.01708, algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def trimmed(update: Tensor, density: float) -> Tensor:
    """The share of largest entries, the others zero; entries of equal size stay or go together."""
    size = update.abs().flatten()
    dropped = len(size) - max(1, round(density * len(size)))
    if dropped == 0:
        return update
    return update * (update.abs() >= size.kthvalue(dropped + 1).values)


def agreed_mean(updates: Iterable[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Entry by entry the mean of those that have the sign of the sum; 0 where the sum is."""
    ups, downs, rising, falling = (torch.zeros(shape, dtype=torch.float64) for _ in range(4))
    for update in updates:
        ups += update.clamp_min(0)
        downs += update.clamp_max(0)
        rising += update > 0
        falling += update < 0
    elected = (ups + downs).sign()
    return torch.where(elected > 0, ups / rising.clamp_min(1), downs / falling.clamp_min(1)) * elected.abs()
