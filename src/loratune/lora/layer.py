"""A module that adds its active adapters to its output; a linear one, unless a subclass says otherwise."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratune.lora.dropout import TokenCounter, drop
from loratune.lora.equation import LowRank
from loratune.lora.linear import Linear, Projection, Weight, lora_linears
from loratune.lora.rescaled import Rescaling, summed
from loratune.lora.rows import Rows, TokenRows
from loratune.lora.state import AdapterState, View
from loratune.lora.swap import Adapting, base_of, put_on, take_off
from loratune.lora.vera import Vera, VeraProjection, of_same_input, vera_linears

# What an adapter adds to one layer.
Term = LowRank | Rescaling


class LoraLayer(Adapting):
    """Mixed in before the class of an adapted module. The forward pass is the equation and assigns nothing."""

    order = 0
    prefix = "Lora"
    holder = "lora"

    lora: nn.ModuleDict
    lora_index: int
    lora_weight: Callable[[nn.Module], Weight]

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = input
        view = self.lora_state.view
        alone = self._alone(x, view)
        if alone is not None:
            (found,) = _linears(x, [self], [alone], self._dropping(alone, view.counter))
            return self._shifted(found, alone)
        active = [self.lora[name] for name in view.active if name in self.lora]
        if active and all(isinstance(term, Rescaling) and term.on_input for term in active):
            return cast(Tensor, super().forward(self._rescaled(x, cast("list[Rescaling]", active)), *args, **kwargs))
        y: Tensor = super().forward(x, *args, **kwargs)
        if view.rows is not None:
            return self._mixed(x, y, view.rows)
        base = y
        for term in active:
            if isinstance(term, Rescaling):
                y = self._changed(term, x, base, y)
                continue
            low_rank = cast(LowRank, term)
            update = self._update(x, low_rank, view.counter, y)
            y = y + (update if low_rank.magnitude is None else self._stretched(low_rank, base, update))
        return y

    def _rescaled(self, x: Tensor, terms: Sequence[Rescaling]) -> Tensor:
        """x + Σ (l - 1) ⊙ x, rounded once."""
        return torch.addcmul(x, x, self._by_feature(summed(terms, x.dtype)))

    def _changed(self, term: Rescaling, x: Tensor, base: Tensor, y: Tensor) -> Tensor:
        """y with what one adapter adds to the base's output."""
        factor = self._by_feature(summed([term], x.dtype if term.on_input else base.dtype))
        if not term.on_input:
            return torch.addcmul(y, base, factor)
        y = y + super().forward(x * factor)
        bias = cast("Tensor | None", getattr(self, "bias", None))
        return y if bias is None else y - self._by_feature(bias.to(y.dtype))

    def _update(self, x: Tensor, low_rank: LowRank, counter: TokenCounter | None, y: Tensor) -> Tensor:
        """s · (B A x + bias), in the dtype of the output y so far."""
        return cast(Tensor, low_rank(self._dropped(x, low_rank, counter)).to(y.dtype))

    def _mixed(self, x: Tensor, y: Tensor, rows: Rows | TokenRows) -> Tensor:
        """y with the update of each row's own adapter, or of each token's."""
        if isinstance(rows, TokenRows):
            return rows.added([self], x, [y])[0]
        update = rows.update(self, x)
        return y if update is None else y + update.to(y.dtype)

    def _by_feature(self, vector: Tensor) -> Tensor:
        """A vector of output features as it is multiplied with an output."""
        return vector

    def _alone(self, x: Tensor, view: View) -> LowRank | None:
        """The active adapter where it is the only one, and `lora_linears` says what the plain formula says."""
        active = [name for name in view.active if name in self.lora]
        if len(active) != 1 or _transformed(x) or view.rows is not None or not self._affine():
            return None
        low_rank = self.lora[active[0]]
        if not isinstance(low_rank, LowRank):
            return None
        # A mask from a generator is another one each time, so that it cannot be drawn again in the backward pass.
        drawn = self.training and low_rank.dropout > 0 and view.counter is None
        return None if drawn or low_rank.magnitude is not None else low_rank

    def _unadapted(self, x: Tensor) -> Tensor:
        return cast(Tensor, super().forward(x))

    def _projection(self, low_rank: LowRank) -> Projection:
        bias = cast("Tensor | None", self.bias)
        tiled = bool(getattr(type(self), "tiled", False))  # what else is mixed in may say so
        return Projection(super().forward, self.lora_weight(self), bias, *low_rank.factors(), low_rank.scale, tiled)

    def _vera(self, vera: Vera) -> VeraProjection:
        bias = cast("Tensor | None", self.bias)
        return VeraProjection(super().forward, self.lora_weight(self), bias, vera.d, vera.b, vera.frozen()[1])

    @staticmethod
    def _shifted(y: Tensor, low_rank: LowRank) -> Tensor:
        return y if low_rank.bias is None else y + (low_rank.bias * low_rank.scale).to(y.dtype)

    def _affine(self) -> bool:
        """Whether the module computes W x + b and nothing else, with its own frozen W."""
        own = self._parameters.get("weight")
        if own is not None and (own.requires_grad or self.weight is not own):
            return False
        return self.lora_weight(self).computed_by(base_of(type(self)).forward)

    def _dropping(self, low_rank: LowRank, counter: TokenCounter | None) -> Linear | None:
        """What A sees of its input, where a counter decides it; asked again in the backward pass, it is the same."""
        p = low_rank.dropout
        if counter is None or p == 0.0 or not self.training:
            return None
        return lambda x: drop(x, p, counter, self.lora_index)

    def _stretched(self, low_rank: LowRank, base: Tensor, update: Tensor) -> Tensor:
        """DoRA: g (W x + s B A x) - W x, with g the factor for each output feature."""
        g = low_rank.stretch(self.lora_weight(self).dense())
        bias = cast("Tensor | None", getattr(self, "bias", None))
        # Autocast leaves the bias in its own dtype.
        Wx = base if bias is None else base - self._by_feature(bias.to(base.dtype))
        return self._by_feature((g - 1).to(base.dtype)) * Wx + self._by_feature(g.to(base.dtype)) * update

    def _dropped(self, x: Tensor, low_rank: LowRank, counter: TokenCounter | None) -> Tensor:
        dropping = self._dropping(low_rank, counter)
        if dropping is not None:
            return dropping(x)
        # In somebody else's loop no counter is set: then torch's own generator is what its users expect.
        return F.dropout(x, low_rank.dropout, self.training)


def together(modules: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """What each of some modules gives for the same x, in one step where nothing else happens when they are called."""
    layers = [module for module in modules if isinstance(module, LoraLayer) and not _overheard(module)]
    if len(layers) == len(modules) and isinstance(layers[0].lora_state.view.rows, TokenRows):
        rows = layers[0].lora_state.view.rows
        return rows.added(layers, x, [layer._unadapted(x) for layer in layers])
    found = [low_rank for low_rank in (layer._alone(x, layer.lora_state.view) for layer in layers) if low_rank]
    if len(found) < len(modules):
        return [module(x) for module in modules]
    # Each layer drops an input of its own, so that there is no common one.
    if any(layer.training and low_rank.dropout > 0 for layer, low_rank in zip(layers, found, strict=True)):
        return [module(x) for module in modules]
    ys = _linears(x, layers, found)
    return [layer._shifted(y, low_rank) for layer, y, low_rank in zip(layers, ys, found, strict=True)]


def _linears(
    x: Tensor, layers: Sequence[LoraLayer], low_ranks: Sequence[LowRank], dropped: Linear | None = None
) -> tuple[Tensor, ...]:
    """What layers with one adapter each give for the same x, but for the biases behind B."""
    pairs = list(zip(layers, low_ranks, strict=True))
    if of_same_input(low_ranks):
        veras = [(layer, cast(Vera, low_rank)) for layer, low_rank in pairs]
        return vera_linears(x, veras[0][1].frozen()[0], [layer._vera(own) for layer, own in veras], dropped)
    return lora_linears(x, [layer._projection(low_rank) for layer, low_rank in pairs], dropped)


@contextmanager
def selecting(module: nn.Module, index: Tensor) -> Iterator[None]:
    """Inside the block `module` sees the tokens at `index` alone: their dropout masks, and adapters, are theirs."""
    state = next((layer.lora_state for layer in module.modules() if isinstance(layer, LoraLayer)), None)
    if state is None:
        yield
        return
    counter, rows = state.view.counter, state.view.rows
    if counter is not None:
        counter = replace(counter, tokens=counter.tokens.flatten()[index])
    if isinstance(rows, TokenRows):
        rows = rows.at(index)
    with state.seeing(state.view._replace(counter=counter, rows=rows)):
        yield


def _overheard(module: nn.Module) -> bool:
    """Whether somebody wants to know when the module is called, or calls something else in its place."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    own = any(vars(module).get(name) for name in ("forward", "_compiled_call_impl", *hooks))
    return own or torch.nn.modules.module._has_any_global_hook()


def _transformed(x: Tensor) -> bool:
    """Whether somebody else decides what the operations on x do: a compiler, autocast, a functional transform."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or torch.is_autocast_enabled(x.device.type)
        or torch._C._are_functorch_transforms_active()
    )


def adapt_in_place(
    module: nn.Module,
    state: AdapterState,
    path: str,
    weight_of: Callable[[nn.Module], Weight],
    kind: type[LoraLayer] = LoraLayer,
) -> LoraLayer:
    """Make `module` look up its adapters in `state`; it has none yet, so its output does not change.

    Args:
        path: its dotted name in the model, from which its dropout masks are counted.
        weight_of: reads its frozen weight.
        kind: what the module becomes; it says what A and B are applied to.
    """
    put_on(module, kind)
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
    if not isinstance(module, Adapting):
        del module.lora_state
