"""A weight in the order in which oneDNN's kernels read it, for products of few tokens.

A product in bf16 puts its weight into blocks first, each time. With few tokens that is a quarter of the time of the
whole product, and of a thin one (an adapter's) most of it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

# For how many tokens the blocks are made; they serve for any number.
_TOKENS = 32


class Blocked:
    """W (out, in), for x W^T: in blocks where that is of use, else as it is."""

    def __init__(self, weight: Tensor) -> None:
        self.dtype = weight.dtype
        self.in_blocks = blocks_help(weight)
        # Nothing of the weight itself is kept beside its blocks.
        self._held = _in_blocks(weight) if self.in_blocks else weight

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b, for x (..., in) of the weight's dtype."""
        if not self.in_blocks:
            return F.linear(x, self._held, bias)
        if x.dtype != self.dtype:
            raise TypeError(f"a product of {x.dtype} and {self.dtype}")
        return cast(Tensor, _linear(x, self._held, bias, "none", [], ""))

    def added(self, y: Tensor, x: Tensor) -> Tensor:
        """y + x W^T, for y (tokens, out) and x (tokens, in) of the weight's dtype; y may be written over."""
        if not self.in_blocks:
            return y.addmm_(x, self._held.T) if y.dtype == self.dtype else y + F.linear(x, self._held)
        if y.dtype != self.dtype:
            return y + self.times(x)
        return cast(Tensor, _linear.binary(x, y, self._held, None, "add"))


_linear: Any = torch.ops.mkldnn._linear_pointwise


def _in_blocks(weight: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TOKENS))


def blocks_help(weight: Tensor) -> bool:
    """Whether this machine has kernels that want the weight in blocks."""
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.numel() > 0 and _supported()


@cache
def _supported() -> bool:
    kernels = torch.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return torch.backends.mkldnn.is_available() and all(hasattr(kernels, n) for n in names) and _in_hardware()


def _in_hardware() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
