"""A module some of whose parameters are adapted by themselves: experts that are stacked in one of them, say.

The module's class gets a property for each such parameter. In the module's own pass it gives the parameter with the
active adapters' terms beside it, elsewhere the sum; the parameter itself is never written.
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from loratune.lora.replaced import in_place_of
from loratune.lora.stacked import StackedLowRank
from loratune.lora.state import AdapterState
from loratune.lora.swap import Adapting, base_of, leave, put_on, wears
from loratune.lora.updated import Term, Updated

# The module whose pass this is, and what of its parameters has been asked for in it.
_PASS: ContextVar[tuple[nn.Module, dict[str, Updated]] | None] = ContextVar("pass", default=None)


class OnParameters(Adapting):
    """Mixed in where some adapter is on parameters; by adapter and parameter their terms are in `lora_parameters`."""

    order = -2
    prefix = "Lora"
    holder = "lora_parameters"

    lora_parameters: nn.ModuleDict

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # which knows tensors alone
            return super().forward(*args, **kwargs)
        before = _PASS.set((self, {}))
        try:
            return super().forward(*args, **kwargs)
        finally:
            _PASS.reset(before)


@cache
def _on_parameters(names: tuple[str, ...]) -> type[OnParameters]:
    namespace: dict[str, Any] = {name: property(_looked_up(name)) for name in names}
    made_by = {"made_by": (_on_parameters, names), "__module__": __name__}
    return type("OnParameters", (OnParameters,), {**namespace, **made_by})


def _looked_up(name: str) -> Any:
    def adapted(self: OnParameters) -> Tensor | Updated | None:
        present = None if torch.compiler.is_compiling() else _PASS.get()
        asked = present[1] if present is not None and present[0] is self else None
        if asked is None:
            updated = _updated(self, name)
            # Somebody else looks at it, and is given a tensor.
            return updated.dense() if isinstance(updated, Updated) else updated
        # What was made where no gradients were wanted has none, and is not for those who want them.
        key = f"{name} {torch.is_grad_enabled()} {torch.is_inference_mode_enabled()}"
        if key not in asked:
            updated = _updated(self, name)
            if not isinstance(updated, Updated):
                return updated
            asked[key] = updated
        return asked[key]

    return adapted


def _updated(module: OnParameters, name: str) -> Tensor | Updated | None:
    """The parameter with the active adapters' terms beside it, or as it is where there are none."""
    base, terms = in_place_of(module, name), _terms(module, name)
    return base if base is None or not terms else Updated(base, terms, base_of(type(module)).__name__)


def _terms(module: OnParameters, name: str) -> tuple[Term, ...]:
    held = module.lora_parameters._modules
    active = module.lora_state.view.active
    present = [terms for adapter in active if (terms := held.get(adapter)) is not None]
    found = [terms._modules.get(name) for terms in present]
    return tuple(cast(StackedLowRank, each).term() for each in found if each is not None)


def adapt_parameter(module: nn.Module, state: AdapterState, adapter: str, name: str, low_rank: StackedLowRank) -> None:
    """Let `adapter` have a low-rank term on one of the module's parameters."""
    if not wears(module, OnParameters.order):
        module.lora_parameters = nn.ModuleDict()
        cast(Adapting, module).lora_state = state
    holder = cast(nn.ModuleDict, module.lora_parameters)
    if adapter not in holder:
        holder[adapter] = nn.ModuleDict()
    low_rank.training = module.training
    cast(nn.ModuleDict, holder[adapter])[name] = low_rank
    _show(module, holder)


def release_parameters(module: nn.Module, adapter: str) -> None:
    """Take the adapter's terms off; the last ones give the module its class back."""
    holder = cast(nn.ModuleDict, module.lora_parameters)
    del holder[adapter]
    if holder:
        _show(module, holder)
        return
    leave(module, OnParameters)


def _show(module: nn.Module, holder: nn.ModuleDict) -> None:
    names = {name for terms in holder.values() for name in terms._modules}
    put_on(module, _on_parameters(tuple(sorted(names))))
