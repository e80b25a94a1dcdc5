"""Blocks that are computed once more in the backward pass see the adapters of their forward pass.

`transformers` gives a block the function that recomputes it, whenever somebody turns that on. The block's class gets a
property in that function's place, which binds what is computed to the view that holds then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from loratune.lora.state import AdapterState
from loratune.lora.swap import Adapting, put_on, take_off

_FUNCTION = "_gradient_checkpointing_func"


class Recomputed(Adapting):
    order = 2

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        recompute = vars(self).get(_FUNCTION)
        if recompute is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {_FUNCTION!r}")
        state = self.lora_state
        return lambda function, *args, **kwargs: recompute(state.bound(function), *args, **kwargs)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, recompute: Callable[..., Any]) -> None:
        vars(self)[_FUNCTION] = recompute


def can_be_recomputed(module: nn.Module) -> bool:
    """Whether `transformers` may recompute this module."""
    # Not asked of the instance: a module says no by raising, which is slow for all the modules of a model.
    return "gradient_checkpointing" in vars(module) or hasattr(type(module), "gradient_checkpointing")


def bind_recomputation(module: nn.Module, state: AdapterState) -> None:
    cast(Adapting, module).lora_state = state
    put_on(module, Recomputed)


def unbind_recomputation(module: nn.Module) -> None:
    take_off(module, Recomputed.order)
    if not isinstance(module, Adapting):
        del module.lora_state
