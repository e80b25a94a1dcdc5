"""What kernels are told of a projection with an adapter."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Adapted(NamedTuple):
    """W x + b + s · B A x.

    Attributes:
        weight: W, (out_features, in_features), with contiguous rows or columns.
        A: (r, in_features), B: (out_features, r), in their masters' dtype.
        scale: s. bias: b, (out_features,); gradients do not ask for it.
    """

    weight: Tensor
    A: Tensor
    B: Tensor
    scale: float
    bias: Tensor | None = None
