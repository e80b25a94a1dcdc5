"""Which modules hold a weight that can be adapted."""

from __future__ import annotations

from torch import nn

from loratune.quant.foreign import foreign_weight
from loratune.quant.linear import QuantizedLinear, QuantizedWeight
from loratune.quant.weight import FrozenWeight, dense_weight


def frozen_weight(module: nn.Module) -> FrozenWeight | None:
    """The module's weight, or None where it is not a linear map this package can adapt."""
    if isinstance(module, QuantizedLinear):
        return QuantizedWeight(module)
    return dense_weight(module) or foreign_weight(module)
