"""Linear layers as they are fastest where few tokens come at a time and nothing is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loratune.lora import Blocked, Mixin, base_modules, base_of, blocks_help, put_on, take_off, wears
from loratune.model.device import available_memory
from loratune.quant import FrozenWeight, QuantizedLinear, QuantizedWeight, frozen_weight

# Of the memory that is free, what copies may take; the rest is for keys and values.
_SHARE = 0.25
# Up to so many tokens eight-bit codes are read faster than blocks, which have twice as many bytes (SmolLM2's linear
# layers on two cores: 10 against 14 ms for 1 token, 11 against 13 for 3, 13 against 12.5 for 4).
_FEWEST_TOKENS = 3


class DecodingLinear(Mixin):
    """Mixed in before a linear layer; where gradients are wanted or the weight has changed, the layer's own way.

    Attributes:
        blocked: a copy of the weight, decoded and in the order in which few tokens are multiplied fastest, or None.
        made_of: which state of the weight it is a copy of.
    """

    order = 4
    prefix = "Decoding"
    bias: Tensor | None
    blocked: Blocked | None
    made_of: tuple[int, ...]

    def forward(self, input: Tensor) -> Tensor:
        y = None if torch.is_grad_enabled() or self.made_of != _state_of(self) else self._quick(input)
        if y is None:
            y = super().forward(input)
        return y

    def _quick(self, x: Tensor) -> Tensor | None:
        layer: nn.Module = self  # what else it is, its class does not say
        if isinstance(layer, QuantizedLinear) and (self.blocked is None or _few(x)):
            found = QuantizedWeight(layer).times(x)
            if found is not None:
                return found if self.bias is None else found + self.bias.to(found.dtype)
        if self.blocked is None or x.dtype != self.blocked.dtype:
            return None
        return self.blocked.times(x, self.bias)


def prepare_decoding(model: nn.Module, *, copy: bool = True) -> list[nn.Module]:
    """Have the frozen linear layers of a model multiply few tokens fast; gives those that were changed for it.

    Args:
        copy: keep a copy of weights that are read faster in another order, or would be decoded for each product, where
            memory has room for all of them.
    """
    found = [module for _, module in base_modules(model) if _can_be(module) and not wears(module, DecodingLinear.order)]
    copied = _copies(found) if copy else {}
    ready = [module for module in found if module in copied or _reads_codes(module)]
    for module in ready:
        vars(module).update(blocked=copied.get(module), made_of=_state_of(module))
        put_on(module, DecodingLinear)
    return ready


@contextmanager
def decoding(model: nn.Module, *, copy: bool = True) -> Iterator[None]:
    """Inside the block the model is prepared so; after it it is what it was before."""
    found = prepare_decoding(model, copy=copy)
    try:
        yield
    finally:
        _take_back(found)


def _copies(modules: Iterable[nn.Module]) -> dict[nn.Module, Blocked]:
    """Of each weight that is faster so; of none where memory has no room for all."""
    wanted = []
    for module in modules:
        weight = frozen_weight(module)
        if weight is not None and _copy_helps(module, weight):
            wanted.append((module, weight))
    size = sum(w.in_features * w.out_features * w.dtype.itemsize for _, w in wanted)
    if size > _SHARE * available_memory(torch.device("cpu")):
        return {}
    try:
        return {module: Blocked(weight.dense()) for module, weight in wanted}
    except RuntimeError:  # there was less memory than it seemed
        return {}


def _copy_helps(module: nn.Module, weight: FrozenWeight) -> bool:
    if weight.device.type != "cpu":
        return False
    return isinstance(module, QuantizedLinear) or blocks_help(weight.dense())


def _can_be(module: nn.Module) -> bool:
    """Whether it is a linear layer that is not trained and computes nothing else."""
    weight = frozen_weight(module)
    if base_of(type(module)) not in (nn.Linear, QuantizedLinear) or weight is None:
        return False
    return not weight.requires_grad and weight.in_features * weight.out_features > 0


def _reads_codes(module: nn.Module) -> bool:
    """Whether the format has a way to multiply a token without decoding the weight."""
    if not isinstance(module, QuantizedLinear):
        return False
    weight = QuantizedWeight(module)
    return weight.times(torch.zeros(1, weight.in_features, dtype=weight.dtype, device=weight.device)) is not None


def _take_back(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        take_off(module, DecodingLinear.order)
        for name in ("blocked", "made_of"):
            vars(module).pop(name, None)


def _few(x: Tensor) -> bool:
    return x.shape[:-1].numel() <= _FEWEST_TOKENS


def _state_of(module: nn.Module) -> tuple[int, ...]:
    """Where its tensors are, and how often each was written."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return tuple(number for t in tensors if t is not None for number in (t.data_ptr(), t._version))
