"""What a frozen weight is, whatever its storage: its shape as a map, and how a delta is folded into it."""

from loratune.quant.weight import FrozenWeight, frozen_weight, rounded_once

__all__ = ["FrozenWeight", "frozen_weight", "rounded_once"]
