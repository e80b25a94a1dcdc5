"""Linear layers with a second copy of their weight in the order that few tokens are multiplied fastest in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from loratune.lora import Blocked, Mixin, base_modules, base_of, blocks_help, put_on, take_off, wears
from loratune.model.device import available_memory

# Of the memory that is free; the rest is for keys and values.
_SHARE = 0.25


class BlockedLinear(Mixin):
    """Mixed in before `nn.Linear`, for passes without gradients.

    Attributes:
        blocked: the copy. blocked_at: which state of the weight it is a copy of.
    """

    order = 4
    prefix = "Blocked"
    weight: Tensor
    bias: Tensor | None
    blocked: Blocked
    blocked_at: tuple[int, int]

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() or self.blocked_at != _state_of(self.weight):
            y: Tensor = super().forward(input)
            return y
        return self.blocked.times(input, self.bias)


def block_linears(model: nn.Module) -> list[nn.Linear]:
    """Copy the weights of frozen linear layers where that is of use and memory has room for all; gives those layers."""
    linears = [cast(nn.Linear, module) for _, module in base_modules(model) if base_of(type(module)) is nn.Linear]
    found = [module for module in linears if not module.weight.requires_grad and blocks_help(module.weight)]
    found = [module for module in found if not wears(module, BlockedLinear.order)]
    if sum(module.weight.nbytes for module in found) > _SHARE * available_memory(torch.device("cpu")):
        return []
    try:
        for module in found:
            vars(module).update(blocked=Blocked(module.weight.detach()), blocked_at=_state_of(module.weight))
            put_on(module, BlockedLinear)
    except RuntimeError:  # there was less memory than it seemed
        _unblock(found)
        return []
    return found


@contextmanager
def blocked_linears(model: nn.Module) -> Iterator[None]:
    """Inside the block the model has such copies; after it what it had before."""
    found = block_linears(model)
    try:
        yield
    finally:
        _unblock(found)


def _unblock(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        take_off(module, BlockedLinear.order)
        for name in ("blocked", "blocked_at"):
            vars(module).pop(name, None)


def _state_of(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), weight._version
