"""A linear module that adds its active adapters to its output."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratune.lora.dropout import TokenCounter, drop
from loratune.lora.equation import LowRank
from loratune.lora.state import AdapterState
from loratune.lora.swap import Mixin, put_on, take_off


class Weight(Protocol):
    """What the equation asks of a frozen weight, however it is stored."""

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out_features, in_features), in the stored dtype unless told."""
        ...


class LoraLayer(Mixin):
    """Mixed in before the class of an adapted module. The forward pass is the equation and assigns nothing."""

    order = 0
    prefix = "Lora"
    holder = "lora"

    lora: nn.ModuleDict
    lora_index: int
    lora_weight: Callable[[nn.Module], Weight]

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = input
        y: Tensor = super().forward(x, *args, **kwargs)
        view = self.lora_state.view
        if view.rows is not None:
            update = view.rows.update(self, x)
            return y if update is None else y + update.to(y.dtype)
        base = y
        for name in view.active:
            if name in self.lora:
                low_rank = cast(LowRank, self.lora[name])
                update = low_rank(self._dropped(x, low_rank.dropout, view.counter)).to(y.dtype)
                y = y + (update if low_rank.magnitude is None else self._stretched(low_rank, base, update))
        return y

    def _stretched(self, low_rank: LowRank, base: Tensor, update: Tensor) -> Tensor:
        """DoRA: g (W x + s B A x) - W x, with g the factor for each output feature."""
        g = low_rank.stretch(self.lora_weight(self).dense())
        bias = cast("Tensor | None", self.bias)
        Wx = base if bias is None else base - bias.to(base.dtype)  # autocast leaves the bias in its own dtype
        return (g - 1).to(base.dtype) * Wx + g.to(base.dtype) * update

    def _dropped(self, x: Tensor, p: float, counter: TokenCounter | None) -> Tensor:
        if not self.training or p == 0.0:
            return x
        # In somebody else's loop no counter is set: then torch's own generator is what its users expect.
        return F.dropout(x, p) if counter is None else drop(x, p, counter, self.lora_index)


def adapt_in_place(
    module: nn.Module, state: AdapterState, path: str, weight_of: Callable[[nn.Module], Weight]
) -> LoraLayer:
    """Make `module` look up its adapters in `state`; it has none yet, so its output does not change.

    Args:
        path: its dotted name in the model, from which its dropout masks are counted.
        weight_of: reads its frozen weight.
    """
    put_on(module, LoraLayer)
    layer = cast(LoraLayer, module)
    layer.lora = nn.ModuleDict()
    layer.lora.training = module.training
    # Plain attributes, past `nn.Module.__setattr__`, which looks for parameters and modules among them first.
    vars(layer).update(lora_state=state, lora_index=zlib.crc32(path.encode()), lora_weight=weight_of)
    return layer


def release(layer: LoraLayer) -> None:
    """Give the module its own class back, without low-rank adapters."""
    module: nn.Module = layer
    take_off(module, LoraLayer.order)
    del module.lora, module.lora_index, module.lora_weight
    if not isinstance(module, Mixin):
        del module.lora_state
