"""What a frozen weight is to everybody else, and the dense ones.

`nn.Linear` stores (out, in), GPT-2's `Conv1D` (in, out).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loratune.quant.form import Form, Use


class FrozenWeight(Protocol):
    """A module's weight seen as the linear map from `in_features` to `out_features`, however it is stored."""

    @property
    def kind(self) -> str:
        """What is shown: the module's class, or the format."""
        ...

    @property
    def form(self) -> Form:
        """What the map is applied to."""
        ...

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """What it is multiplied in unless an input says otherwise."""
        ...

    @property
    def version(self) -> int:
        """Grows with every change in place."""
        ...

    @property
    def lasting(self) -> bool:
        """Whether what is lent, in its own dtype, may be held while the next one is: it takes no memory of its own."""
        ...

    @property
    def requires_grad(self) -> bool: ...

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out_features, in_features), detached, in the stored dtype unless told."""
        ...

    def lent(self, dtype: torch.dtype | None = None) -> Tensor:
        """The same for one product: the next one that is lent on this thread may be written in its place."""
        ...

    def computed_by(self, forward: Callable[..., Any]) -> bool:
        """Whether `forward`, of the module's class, computes W x + b and nothing else."""
        ...

    def plus(self, delta: Tensor) -> Mapping[str, Tensor]:
        """What the module's tensors become, by name, with `delta` (out, in) added.

        Added in the delta's dtype (fp32 or fp64) and rounded once to what is stored.
        """
        ...


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A weight in a floating dtype.

    Attributes:
        parameter: the tensor the module multiplies by.
        transposed: True where it is stored (in, out), as in GPT-2's `Conv1D` and in embeddings.
        use, kernel, groups: of its `form`.
    """

    kind: str
    parameter: nn.Parameter
    transposed: bool
    use: Use = "product"
    kernel: tuple[int, ...] = ()
    groups: int = 1

    @property
    def form(self) -> Form:
        # Made here: a compiler takes a default that is no plain value for an unknown object.
        return Form(self.use, self.kernel, self.groups)

    @property
    def in_features(self) -> int:
        return self.parameter.shape[0] if self.transposed else self.parameter.shape[1:].numel()

    @property
    def out_features(self) -> int:
        return self.parameter.shape[1 if self.transposed else 0]

    @property
    def device(self) -> torch.device:
        return self.parameter.device

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    @property
    def version(self) -> int:
        return self.parameter._version

    @property
    def lasting(self) -> bool:
        return True

    @property
    def requires_grad(self) -> bool:
        return self.parameter.requires_grad

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        stored = self.parameter.detach()
        return (stored.T if self.transposed else stored.flatten(1)).to(dtype or stored.dtype)

    def lent(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.dense(dtype)

    def computed_by(self, forward: Callable[..., Any]) -> bool:
        if self.transposed:
            return forward.__qualname__ == "Conv1D.forward" and forward.__module__.startswith("transformers.")
        return forward is nn.Linear.forward

    def plus(self, delta: Tensor) -> Mapping[str, Tensor]:
        stored = delta.T if self.transposed else delta.reshape(self.parameter.shape)
        return {"weight": rounded_once(self.parameter.detach().to(delta.dtype) + stored, self.parameter.dtype)}


def rounded_once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value.to(dtype)`; torch takes fp64 to bf16 and fp16 by way of fp32, which would round twice."""
    if value.dtype != torch.float64 or dtype not in (torch.bfloat16, torch.float16):
        return value.to(dtype)
    # Rounding to odd keeps, in fp32's last bit, that something was cut off (Boldo and Melquiond, "When double rounding
    # is odd", 2004): of the two neighbours of an inexact value take the one with an odd last bit.
    near = value.float()
    cut = value - near.double()
    even = (near.view(torch.int32) & 1) == 0
    other = torch.nextafter(near, torch.copysign(torch.full_like(near, torch.inf), cut.float()))
    return torch.where((cut != 0) & even, other, near).to(dtype)


def dense_weight(module: nn.Module) -> DenseWeight | None:
    """The module's weight where it is a linear map of plain numbers, else None."""
    # The module's own, whatever an adapter puts in its place while it is active.
    weight = module._parameters.get("weight")
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or not torch.is_floating_point(weight):
        return None
    if isinstance(module, nn.Linear):
        return DenseWeight("Linear", weight, transposed=False)
    # transformers' Conv1D is recognised by its name and its `nf`, so that nothing here imports transformers.
    if any(kind.__name__ == "Conv1D" for kind in type(module).__mro__) and hasattr(module, "nf"):
        return DenseWeight("Conv1D", weight, transposed=True)
    return None
