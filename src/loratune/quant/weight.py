"""Dense weights: `nn.Linear` stores (out, in), GPT-2's `Conv1D` stores (in, out)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class FrozenWeight:
    """A module's weight seen as the linear map from `in_features` to `out_features`.

    Attributes:
        parameter: the tensor the module multiplies by.
        transposed: True where it is stored (in, out), as in GPT-2's `Conv1D`.
    """

    kind: str
    parameter: nn.Parameter
    transposed: bool

    @property
    def in_features(self) -> int:
        return self.parameter.shape[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        return self.parameter.shape[1 if self.transposed else 0]

    @property
    def version(self) -> int:
        """Grows with every change in place."""
        return self.parameter._version

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out_features, in_features), detached, in the stored dtype unless told."""
        stored = self.parameter.detach()
        return (stored.T if self.transposed else stored).to(dtype or stored.dtype)

    def plus(self, delta: Tensor) -> Tensor:
        """The weight with `delta` (out, in) added, in the stored layout and dtype.

        Added in the delta's dtype (fp32 or fp64) and rounded once to the weight's.
        """
        stored = delta.T if self.transposed else delta
        return rounded_once(self.parameter.detach().to(delta.dtype) + stored, self.parameter.dtype)


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


def frozen_weight(module: nn.Module) -> FrozenWeight | None:
    """The module's weight, or None where it is not a linear map this package can adapt."""
    # The module's own, whatever an adapter puts in its place while it is active.
    weight = module._parameters.get("weight")
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or not torch.is_floating_point(weight):
        return None
    if isinstance(module, nn.Linear):
        return FrozenWeight("Linear", weight, transposed=False)
    # transformers' Conv1D is recognised by its name and its `nf`, so that nothing here imports transformers.
    if any(kind.__name__ == "Conv1D" for kind in type(module).__mro__) and hasattr(module, "nf"):
        return FrozenWeight("Conv1D", weight, transposed=True)
    return None
