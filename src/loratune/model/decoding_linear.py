"""Linear layers as they are fastest where few tokens come at a time and nothing is trained."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from loratune.lora import Blocked, Mixin, Retraining, base_modules, base_of, blocks_help, put_on, take_off, wears
from loratune.model.device import available_memory
from loratune.quant import FrozenWeight, QuantizedLinear, QuantizedWeight, Sample, frozen_weight

# Of the memory that is free, what copies may take; the rest is for keys and values.
_SHARE = 0.25
# Up to so many tokens eight-bit codes are read faster than blocks, which have twice as many bytes (SmolLM2's linear
# layers on two cores: 9 against 14 ms for 1 token, 12 against 13 for 3, 13 against 12.5 for 4).
_FEWEST_TOKENS = 3


class _Made(NamedTuple):
    """Which tensors something was made of, as they were then.

    Attributes:
        tensors: the objects themselves; an address may be another's when they are gone.
        states: where the numbers of each are, and how often they were written.
        samples: some of the numbers, for writes that leave no trace (through `.data`, by fused optimizers).
    """

    tensors: tuple[weakref.ref[Tensor], ...]
    states: tuple[tuple[int, int], ...]
    samples: tuple[Tensor, ...]

    @classmethod
    def of(cls, module: nn.Module) -> _Made:
        held = _tensors(module)
        samples = tuple(Sample.of(t).values for t in held)
        return cls(tuple(weakref.ref(t) for t in held), tuple(map(_state, held)), samples)

    def is_of(self, held: tuple[Tensor, ...]) -> bool:
        """Whether these are the tensors, whatever they hold now."""
        return len(held) == len(self.tensors) and all(seen() is t for seen, t in zip(self.tensors, held, strict=True))

    def holds(self, held: tuple[Tensor, ...]) -> bool:
        """Whether of these, which are the tensors, none is known to have been written."""
        return all(state == _state(t) for state, t in zip(self.states, held, strict=True))

    def looks_like(self, held: tuple[Tensor, ...]) -> bool:
        """Whether these are the tensors, with the numbers that they had, as far as the samples tell."""
        return (
            self.is_of(held)
            and self.holds(held)
            and all(torch.equal(Sample.of(t).values, values) for t, values in zip(held, self.samples, strict=True))
        )


class DecodingLinear(Mixin):
    """Mixed in before a linear layer; where gradients are wanted or the weight has changed, the layer's own way.

    Attributes:
        blocked: a copy of the weight, decoded and in the order in which few tokens are multiplied fastest, or None.
        made_of: what it is a copy of; None once the weight has been written, or may have been trained.
    """

    # Before the fused one: blocks of its own, made once, are what few tokens and whole prompts are multiplied with.
    order = 3
    prefix = "Decoding"
    lasts = False
    tiled = False
    bias: Tensor | None
    blocked: Blocked | None
    made_of: _Made | None

    def forward(self, input: Tensor) -> Tensor:
        y = self._quick(input) if self._is_ready() else None
        if y is None:
            y = super().forward(input)
        return y

    def _is_ready(self) -> bool:
        if torch.compiler.is_compiling() or self.made_of is None:
            return False
        held = _tensors(self)
        if not self.made_of.is_of(held):  # an adapter has its own, or it was exchanged
            return False
        trains = torch.is_grad_enabled()
        # Optimizers may write what they train without a trace, and an address may come again.
        if (trains and any(t.requires_grad for t in held)) or not self.made_of.holds(held):
            vars(self).update(blocked=None, made_of=None)
            return False
        return not trains

    def _quick(self, x: Tensor) -> Tensor | None:
        layer: nn.Module = self  # what else it is, its class does not say
        if isinstance(layer, QuantizedLinear) and (self.blocked is None or _few(x)):
            found = QuantizedWeight(layer).times(x)
            if found is not None:
                return found if self.bias is None else found + self.bias.to(found.dtype)
        if self.blocked is None or x.dtype != self.blocked.dtype:
            return None
        return self.blocked.times(x, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("blocked", "made_of")}


def prepare_decoding(model: nn.Module, *, copy: bool = True) -> list[nn.Module]:
    """Have the frozen linear layers of a model multiply few tokens fast; gives those that were changed for it.

    What was prepared for weights that are others by now is prepared anew.

    Args:
        copy: keep a copy of weights that are read faster in another order, or would be decoded for each product, where
            memory has room for all of them.
    """
    before = set(_stale(model))
    _take_back(before)
    found = [m for _, m in base_modules(model) if _can_be(m) and not wears(m, DecodingLinear.order)]
    copied = _copies(found) if copy else {}
    ready = [module for module in found if module in copied or _reads_codes(module)]
    for module in ready:
        vars(module).update(blocked=copied.get(module), made_of=_Made.of(module))
        put_on(module, DecodingLinear)
    return [module for module in ready if module not in before]


def end_decoding(model: nn.Module) -> None:
    """Take back whatever was prepared."""
    _take_back(_prepared(model))


@contextmanager
def decoding(model: nn.Module, *, copy: bool = True) -> Iterator[None]:
    """Inside the block the model is prepared so; after it it is what it was before."""
    found = prepare_decoding(model, copy=copy)
    try:
        yield
    finally:
        _take_back(found)


def _prepared(model: nn.Module) -> list[nn.Module]:
    return [module for _, module in base_modules(model) if wears(module, DecodingLinear.order)]


def _stale(model: nn.Module) -> Iterator[nn.Module]:
    """What was prepared for weights that are not those of now, or may be trained."""
    for module in _prepared(model):
        if isinstance(module, Retraining):  # whose weight is another tensor each time
            yield module
            continue
        made = cast(DecodingLinear, module).made_of
        held = _tensors(module)
        if made is None or not made.looks_like(held) or any(t.requires_grad for t in held):
            yield module


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
    if base_of(type(module)) not in (nn.Linear, QuantizedLinear) or weight is None or isinstance(module, Retraining):
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


def _tensors(module: nn.Module) -> tuple[Tensor, ...]:
    """Those that its weight is: where an adapter has its own of it, that one."""
    if isinstance(module, QuantizedLinear):
        return tuple(t for t in module._buffers.values() if t is not None)
    return (cast(Tensor, module.weight),)


def _state(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), 0 if t.is_inference() else t._version  # which counts no writes to those
