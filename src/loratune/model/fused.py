"""What the fused blocks have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from loratune.kernels import deviation
from loratune.lora import Mixin


class Fused(Mixin):
    """Mixed in before a module of a family, to compute the same with less kept and copied.

    Attributes:
        settings: the plain attributes that this puts on a module, found out in a trial.
    """

    order = 4
    prefix = "Fused"
    settings: tuple[str, ...] = ()


def agree(found: Tensor, stock: Tensor, dtype: torch.dtype) -> bool:
    """Whether two results have one shape and are near, as `is_near` says."""
    return found.shape == stock.shape and is_near(deviation(found, stock), dtype)


def is_near(deviation: float, dtype: torch.dtype) -> bool:
    """Whether that is no more than two sound ways of computing one module differ by in this dtype; NaN is not."""
    return deviation <= max(4 * torch.finfo(dtype).eps, 1e-5)
