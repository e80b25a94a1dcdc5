"""A linear layer whose weight is kept in few bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratune.quant.form import PRODUCT, Form
from loratune.quant.formats import FORMATS, Format
from loratune.quant.room import room
from loratune.quant.sample import Sample
from loratune.quant.weight import dense_weight


class QuantizedLinear(nn.Module):
    """y = W x + b; W is decoded for each product, and nothing of it is kept for the backward pass, which decodes again.

    The stored tensors are buffers (`packed`, `scales`, ...): no cast of the model reaches them, no optimizer sees them.

    Attributes:
        format: a name of `FORMATS`. dtype: what W had before, in which it is decoded unless the input's is another.
        sample: what W, as the module stored it, was known by.
        original: W as it was, where somebody asked to keep it; not saved, and not moved with the module.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, format: str) -> None:
        super().__init__()
        self.format, self.dtype, self.sample = format, weight.dtype, Sample.of(weight)
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        for name, tensor in FORMATS[format].encode(weight).items():
            self.register_buffer(name, tensor)
        self.original: tuple[Tensor, ...] = ()
        # In a tuple, so that it is nobody's child: the layer that this one stands for, without its weight.
        self.instead_of: tuple[nn.Module, ...] = ()

    @classmethod
    def of(
        cls, module: nn.Module, format: str, *, device: torch.device | None = None, keep_original: bool = False
    ) -> Self:
        """The layer that stands for `module`, one with a dense weight; its bias is the same parameter."""
        dense = dense_weight(module)
        assert dense is not None, "only dense weights are quantised"
        found = cls(dense.dense().to(device or dense.device), module._parameters.get("bias"), format)
        found.sample = Sample.of(dense.parameter)
        found.original = (dense.dense(),) if keep_original else ()
        found.training = module.training
        module._parameters["weight"] = None
        found.instead_of = (module,)
        return found

    def decoded(self) -> nn.Module:
        """The layer that this one stands for, with the weight that the bits stand for."""
        (module,) = self.instead_of
        weight = QuantizedWeight(self).dense()
        stored = weight if isinstance(module, nn.Linear) else weight.T
        module._parameters["weight"] = nn.Parameter(stored.contiguous(), requires_grad=False)
        module._parameters["bias"] = self.bias
        return module.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = _Product.apply(x, self.bias, QuantizedWeight(self))  # type: ignore[no-untyped-call]
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`to(dtype)` and `half()` are for numbers, of which the scales are part of the format."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            now = self._buffers[name]
            if buffer is not None and now is not None and now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}"


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """The weight of a `QuantizedLinear`."""

    module: QuantizedLinear

    @property
    def kind(self) -> str:
        return self.module.format

    @property
    def form(self) -> Form:
        return PRODUCT

    @property
    def in_features(self) -> int:
        return self.module.in_features

    @property
    def out_features(self) -> int:
        return self.module.out_features

    @property
    def device(self) -> torch.device:
        return self._stored()["packed"].device

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @property
    def version(self) -> int:
        return sum(tensor._version for tensor in self._stored().values())

    @property
    def lasting(self) -> bool:
        return False

    @property
    def requires_grad(self) -> bool:
        return False

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        if dtype == torch.float64:  # exactly what fp32 holds: both formats are products of two fp32 numbers, rounded
            return self._format.decode(self._stored(), self._shape, torch.float32).double()
        return self._format.decode(self._stored(), self._shape, dtype or self.dtype)

    def lent(self, dtype: torch.dtype | None = None) -> Tensor:
        wanted = dtype or self.dtype
        if wanted == torch.float64:
            return self.dense(wanted)
        place = room(self._format.size_of(self._shape), wanted, self.device)
        return self._format.decode(self._stored(), self._shape, wanted, place)

    def times(self, x: Tensor) -> Tensor | None:
        """x Wᵀ without a gradient by the codes themselves; None where decoding them is faster."""
        return self._format.times(self._stored(), x)

    def computed_by(self, forward: Callable[..., Any]) -> bool:
        return forward is QuantizedLinear.forward

    def plus(self, delta: Tensor) -> Mapping[str, Tensor]:
        """Quantised again, which rounds both the weight's own values and what is added."""
        return self._format.encode((self.dense(delta.dtype) + delta).float())

    def missed(self, stored: Mapping[str, Tensor], delta: Tensor) -> float:
        """How far what `plus` gave is from W + `delta`, relative to the delta: from 1 on nothing of it is certain."""
        merged = self._format.decode(stored, self._shape, torch.float32)
        away = merged - (self.dense(torch.float32) + delta.float())
        return float(away.norm() / delta.norm().clamp(min=torch.finfo(torch.float32).tiny))

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def _format(self) -> Format:
        return FORMATS[self.module.format]

    def _stored(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self.module._buffers.items() if buffer is not None}


class _Product(torch.autograd.Function):
    """W x + b that keeps neither W nor, where only x is to be trained through, x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: QuantizedWeight) -> Tensor:
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        return F.linear(x, weight.lent(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        # Where the gradient gets a gradient, the weight is kept for it.
        weight = ctx.weight.dense if torch.is_grad_enabled() else ctx.weight.lent
        gx = gy @ weight(gy.dtype) if ctx.needs_input_grad[0] else None
        gb = gy.flatten(0, -2).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return gx, gb, None
