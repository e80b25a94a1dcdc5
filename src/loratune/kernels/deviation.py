"""How far apart two ways of computing the same are."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor


def deviation(found: Tensor, stock: Tensor) -> float:
    """How far a result is from the one that it is held against, relative; NaN where either has one."""
    return float((found.float() - stock.float()).norm() / stock.float().norm())


def furthest(found: Iterable[tuple[float, str]]) -> tuple[float, str]:
    """Of deviations and whose they are the largest; NaN, which compares as nothing, is one."""
    return max(found, key=lambda one: math.inf if math.isnan(one[0]) else one[0])
