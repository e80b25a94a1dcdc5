"""Frozen linear layers of which each product is one pass of a processor's matrix unit (`kernels/c_products.c`)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from loratune.kernels import has_tiles, kernels_for, sum_of_products
from loratune.lora import base_of, base_product, put_on
from loratune.model.fused import Fused


class TiledLinear(Fused):
    """Mixed in before a linear layer; where there are no tiles for it, or it is trained, it goes its own way."""

    tiled = True
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        own = self.weight is weight and self.bias is bias  # an adapter may have its own
        if kernels_for(input) is None or not own or not _computes(input, weight, bias):
            return cast(Tensor, super().forward(input))
        if torch.is_grad_enabled() and input.requires_grad:
            return cast(Tensor, _TiledLinear.apply(input, weight, bias))  # type: ignore[no-untyped-call]
        return _computed(input, cast(Tensor, weight), bias)


def _computes(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    if weight is None or any(t is not None and t.requires_grad for t in (weight, bias)):
        return False
    return has_tiles(base_product(x.detach(), weight, bias))


def _computed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, rounded once."""
    return sum_of_products(base_product(x, weight, bias)).view(*x.shape[:-1], weight.shape[0])


class _TiledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _computed(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants the gradient's gradient
            return gy @ weight, None, None
        flat = gy.reshape(-1, gy.shape[-1])
        return sum_of_products([(flat, weight)]).view(*gy.shape[:-1], weight.shape[1]), None, None


def fuse_linear(module: nn.Module) -> bool:
    """Mix `TiledLinear` in where the module is a frozen linear layer with kernels for it; says whether."""
    weight = module._parameters.get("weight")
    if base_of(type(module)) is not nn.Linear or weight is None or weight.requires_grad or not weight.numel():
        return False
    if not has_tiles([(weight.new_ones(weight.shape[1]).expand(_ROWS, -1).contiguous(), weight.T)]):
        return False
    put_on(module, TiledLinear)
    return True


# Enough for tiles.
_ROWS = 64
