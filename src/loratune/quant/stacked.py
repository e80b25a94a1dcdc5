"""Weights of experts that are one parameter: a stack of matrices, or a single matrix that no module stands for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loratune.quant.adaptable import adaptable
from loratune.quant.form import Form

_COMPUTES: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class StackedWeight:
    """A parameter (experts, out, in), or (experts, in, out) where its module says `is_transposed`, or (out, in).

    So peft reads the dimensions; a module that stores (in, out) without saying so has A on the side of its outputs.
    """

    parameter: nn.Parameter
    transposed: bool

    @property
    def experts(self) -> int:
        return len(self.parameter) if self.parameter.ndim == 3 else 1

    @property
    def in_features(self) -> int:
        return self.parameter.shape[-2 if self.transposed else -1]

    @property
    def out_features(self) -> int:
        return self.parameter.shape[-1 if self.transposed else -2]

    def form(self, met: int) -> Form:
        """
        Args:
            met: how many of the experts a token goes through.
        """
        return Form("stack", experts=self.experts, met=min(met, self.experts))

    def one(self, number: int) -> Tensor:
        """(out_features, in_features) of one expert, detached; it shares the parameter's memory."""
        stored = self.parameter.detach()
        matrix = stored[number] if stored.ndim == 3 else stored
        return matrix.T if self.transposed else matrix


def stacked_weight(module: nn.Module, name: str) -> StackedWeight | None:
    """The module's parameter of that name as a stack; None where it has none of two or three dimensions."""
    parameter = module._parameters.get(name)
    if parameter is None or parameter.ndim not in (2, 3):
        return None
    transposed = parameter.ndim == 3 and bool(getattr(module, "is_transposed", False))
    return StackedWeight(parameter, transposed)


def why_not_stacked(module: nn.Module, name: str) -> str:
    """What stands against adapting the module's parameter of that name by itself; empty where nothing does."""
    parameter = module._parameters[name]
    assert parameter is not None
    if parameter.ndim not in (2, 3):
        return f"it has the shape {tuple(parameter.shape)}, and only two or three dimensions can be adapted"
    if parameter.dtype not in _COMPUTES:
        return f"it is kept in {str(parameter.dtype).removeprefix('torch.')}, in which nothing can be added to it"
    if name == "weight" and adaptable(module) is not None:
        return "it is the weight of a module that can be adapted itself: name that in target_modules"
    return ""
