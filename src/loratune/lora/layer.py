"""A linear module that adds its active adapters to its output.

`adapt_in_place` swaps the class of a module, as `torch.nn.utils.parametrize` and FSDP2 do: the object, its weight, its
hooks and its place in the tree stay, `isinstance` still holds, and `release` swaps the class back.
"""

from __future__ import annotations

import types
import zlib
from dataclasses import dataclass
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from loratune.lora.dropout import TokenCounter, drop
from loratune.lora.equation import LowRank


@dataclass(slots=True)
class AdapterState:
    """What all adapted layers of one model look up: switching adapters is a change here, never a walk."""

    active: tuple[str, ...] = ()
    counter: TokenCounter | None = None


class LoraLayer(nn.Module):
    """Mixed in before the class of an adapted module. The forward pass is the equation and assigns nothing."""

    lora: nn.ModuleDict
    lora_state: AdapterState
    lora_index: int

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        state = self.lora_state
        for name in state.active:
            if name in self.lora:
                low_rank = cast(LowRank, self.lora[name])
                y = y + low_rank(self._dropped(x, low_rank.dropout, state.counter)).to(y.dtype)
        return y

    def _dropped(self, x: Tensor, p: float, counter: TokenCounter | None) -> Tensor:
        if not self.training or p == 0.0:
            return x
        # In somebody else's loop no counter is set: then torch's own generator is what its users expect.
        return F.dropout(x, p) if counter is None else drop(x, p, counter, self.lora_index)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (_base_of(type(self)),), self.__dict__


_adapted_classes: dict[type[nn.Module], type[LoraLayer]] = {}


def _adapted(base: type[nn.Module]) -> type[LoraLayer]:
    if base not in _adapted_classes:
        _adapted_classes[base] = type(f"Lora{base.__name__}", (LoraLayer, base), {"__module__": base.__module__})
    return _adapted_classes[base]


def _base_of(adapted: type[nn.Module]) -> type[nn.Module]:
    return cast(type[nn.Module], adapted.__mro__[adapted.__mro__.index(LoraLayer) + 1])


def _rebuild(base: type[nn.Module]) -> nn.Module:
    kind = _adapted(base)
    return kind.__new__(kind)


def adapt_in_place(module: nn.Module, state: AdapterState, path: str) -> LoraLayer:
    """Make `module` look up its adapters in `state`; it has none yet, so its output does not change.

    `path` is its dotted name in the model, from which its dropout masks are counted.
    """
    module.__class__ = _adapted(type(module))
    layer = cast(LoraLayer, module)
    layer.lora = nn.ModuleDict()
    layer.lora.train(module.training)
    layer.lora_state = state
    layer.lora_index = zlib.crc32(path.encode())
    _rebind(layer)
    return layer


def release(layer: LoraLayer) -> None:
    """Give the module its own class back, without adapters."""
    del layer.lora, layer.lora_state, layer.lora_index
    module: nn.Module = layer
    module.__class__ = _base_of(type(layer))
    _rebind(layer)


def adapter_prefixes(model: nn.Module) -> tuple[str, ...]:
    """The prefixes of names in `state_dict` under which adapters' tensors stand; a base may use the word itself."""
    return tuple(f"{path}.lora." if path else "lora." for path, m in model.named_modules() if isinstance(m, LoraLayer))


def patched_forward(module: nn.Module) -> bool:
    """Whether a replaced `forward` would hide the adapter. accelerate's hooks are known: `_rebind` follows them."""
    held = vars(module).get("_old_forward", vars(module).get("forward"))
    return held is not None and not _own_forward(held, module)


def _rebind(module: nn.Module) -> None:
    """accelerate's hooks hold the bound forward they replaced; it must be the one of the present class.

    Taken off again, such a hook leaves a bound forward on the instance.
    """
    for name in ("_old_forward", "forward"):
        if _own_forward(vars(module).get(name), module):
            vars(module)[name] = types.MethodType(type(module).forward, module)


def _own_forward(forward: object, module: nn.Module) -> bool:
    """Whether this is the bound method that a class of the module defines."""
    return (
        isinstance(forward, types.MethodType)
        and forward.__self__ is module
        and any(vars(kind).get("forward") is forward.__func__ for kind in (*type(module).__mro__, LoraLayer))
    )
