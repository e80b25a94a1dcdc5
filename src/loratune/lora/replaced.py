"""Tensors of a module that an adapter has its own of: trained biases, and modules trained whole.

The module's class gets a property for each such tensor. It gives the active adapter's, so whatever reads
`module.weight` sees it, and the base's own tensor is never written.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from torch import Tensor, nn

from loratune.lora.state import AdapterState
from loratune.lora.swap import Adapting, leave, put_on, wears


class Tensors(nn.Module):
    """One adapter's own tensors of a module, under the module's names for them."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            # One that is a parameter already is tied to another module's.
            self.register_parameter(name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))

    def _load_from_state_dict(self, state_dict, prefix, *rest):  # type: ignore[no-untyped-def]
        if any(prefix + name in state_dict for name in self._parameters):  # a checkpoint of the base alone has none
            super()._load_from_state_dict(state_dict, prefix, *rest)


class Replacing(Adapting):
    """Mixed in where some adapter has tensors of its own."""

    order = 1
    holder = "lora_replaced"
    lora_replaced: nn.ModuleDict


@cache
def _replacing(names: tuple[str, ...]) -> type[Replacing]:
    namespace: dict[str, Any] = {name: property(_looked_up(name)) for name in names}
    return type("Replacing", (Replacing,), {**namespace, "made_by": (_replacing, names), "__module__": __name__})


def _looked_up(name: str) -> Any:
    return lambda self: in_place_of(self, name)


def in_place_of(module: Adapting, name: str) -> Tensor | None:
    """The active adapter's own tensor in the place of the module's, or the module's."""
    own = cast("Tensor | None", module._parameters[name])
    holder = cast("nn.ModuleDict | None", module._modules.get(Replacing.holder))
    for adapter in module.lora_state.view.active if holder is not None else ():
        tensors = cast(nn.ModuleDict, holder)._modules.get(adapter)
        if tensors is not None and name in tensors._parameters:
            replacement = cast(Tensor, tensors._parameters[name])
            # Masters may be finer than the base; the module computes in the base's dtype. A view, and no parameter: who
            # ties weights by assigning it elsewhere is told that it is none.
            return replacement.to(replacement.dtype if own is None else own.dtype).view_as(replacement)
    return own


def replace_in(module: nn.Module, state: AdapterState, adapter: str, tensors: dict[str, Tensor]) -> Tensors:
    """Let `adapter` have its own of some of the module's parameters."""
    added = Tensors(tensors)
    if not wears(module, Replacing.order):
        module.lora_replaced = nn.ModuleDict()
        cast(Adapting, module).lora_state = state
    holder = cast(nn.ModuleDict, module.lora_replaced)
    holder[adapter] = added
    _show(module, holder)
    return added


def give_back(module: nn.Module, adapter: str) -> None:
    """Take the adapter's tensors off; the last ones take the property with them."""
    holder = cast(nn.ModuleDict, module.lora_replaced)
    del holder[adapter]
    if holder:
        _show(module, holder)
        return
    leave(module, Replacing)


def _show(module: nn.Module, holder: nn.ModuleDict) -> None:
    names = {name for tensors in holder.values() for name in tensors._parameters}
    put_on(module, _replacing(tuple(sorted(names))))
