"""A convolution that adds its active adapters to its output.

A is a convolution of all inputs to r channels, with the module's own kernel, stride, padding and dilation; B one of
single points, with the module's groups: of h, each group of the outputs sees r / groups channels.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from loratune.errors import AdapterStateError
from loratune.lora.dropout import TokenCounter
from loratune.lora.equation import LowRank
from loratune.lora.layer import LoraLayer
from loratune.lora.state import View

_CONVOLVE: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)


class LoraConvolution(LoraLayer):
    def _alone(self, x: Tensor, view: View) -> LowRank | None:
        del x, view
        return None

    def _update(self, x: Tensor, low_rank: LowRank, counter: TokenCounter | None, y: Tensor) -> Tensor:
        A, B = low_rank.factors()
        module: Any = self
        convolve = _CONVOLVE[len(module.kernel_size) - 1]
        x, padding = self._dropped(x, low_rank, counter), module.padding
        if module.padding_mode != "zeros":
            x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
        h = convolve(x, A.to(x.dtype), None, module.stride, padding, module.dilation) * low_rank.scale
        u = convolve(h, B.to(h.dtype), groups=module.groups)
        if low_rank.bias is not None:
            u = u + self._by_feature((low_rank.bias * low_rank.scale).to(u.dtype))
        return cast(Tensor, u.to(y.dtype))

    def _by_feature(self, vector: Tensor) -> Tensor:
        module: Any = self
        return vector.view(-1, *(1 for _ in module.kernel_size))

    def _dropped(self, x: Tensor, low_rank: LowRank, counter: TokenCounter | None) -> Tensor:
        if counter is not None and low_rank.dropout > 0 and self.training:
            raise AdapterStateError(
                "lora_dropout in a convolution, whose input are no tokens: its masks would depend on the micro-batch",
                hint="train with lora_dropout=0, or leave the convolutions out of target_modules",
            )
        return super()._dropped(x, low_rank, counter)

    def _mixed(self, x: Tensor, y: Tensor, rows: Any) -> Tensor:
        del x, y, rows
        raise AdapterStateError(
            "a convolution was given rows with adapters of their own", hint="activate() one such adapter at a time"
        )
