"""The gated feed-forward block, down(act(gate(x)) · up(x)), that keeps what gate and up gave and nothing else.

Their product, which the last projection would keep, is computed again where the backward pass asks for it (Shazeer,
"GLU variants improve transformer", arXiv:2002.05202, has the formula).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratune.kernels import kernels_for
from loratune.lora import put_on, together
from loratune.model.fused import Fused
from loratune.quant import frozen_weight

# Activation → itself and its gradient, which is given the output's gradient and the input.
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda gy, x: torch.ops.aten.gelu_backward(gy, x, approximate="tanh"),
    ),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
}


class _Halves:
    """What gate and up gave, and act(gate) from where the backward pass first needs it to where it last does."""

    def __init__(self, activation: str) -> None:
        self.name = activation
        self.act, self.gradient = _ACTIVATIONS[activation]
        self.active: Tensor | None = None

    def product(self, gate: Tensor, up: Tensor) -> Tensor:
        kernels = kernels_for(gate)
        product: Tensor = self.composed(gate, up) if kernels is None else kernels.gated_forward(gate, up, self.name)
        return product

    def composed(self, gate: Tensor, up: Tensor) -> Tensor:
        """The product as the families compute it, rounded twice."""
        return self.act(gate).mul_(up)

    def product_again(self, gate: Tensor, up: Tensor) -> Tensor:
        if kernels_for(gate) is not None:
            return self.product(gate, up)
        self.active = self.act(gate)
        return self.active * up

    def gradients(self, gy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Those of gate and up."""
        if (kernels := kernels_for(gate)) is not None:
            g_gate, g_up = kernels.gated_backward(gy, gate, up, self.name)
            return g_gate, g_up
        active = self.act(gate) if self.active is None else self.active
        self.active = None
        return self.gradient(gy * up, gate), active.mul_(gy)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, halves: _Halves) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.halves = halves
        return halves.product(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.halves.gradients(gy, *ctx.saved_tensors), None


class FusedGated(Fused):
    """Mixed in before a family's feed-forward block."""

    settings = ("gated_activation",)
    gated_activation: str

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return cast(Tensor, super().forward(x))
        gate, up = _gate_and_up(self, x)
        halves, down_proj = _Halves(self.gated_activation), cast(nn.Module, self.down_proj)
        if not torch.is_grad_enabled():
            return cast(Tensor, down_proj(halves.product(gate, up)))
        product: Tensor = _Gated.apply(gate, up, halves)  # type: ignore[no-untyped-call]
        if not product.requires_grad or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            # Somebody else decides what is kept: recomputation of the whole layer, say.
            return cast(Tensor, down_proj(product))
        with torch.autograd.graph.saved_tensors_hooks(*_made_again(product, halves)):
            return cast(Tensor, down_proj(product))


def _made_again(product: Tensor, halves: _Halves) -> tuple[Any, Any]:
    """Hooks that keep nothing in place of `product` and make it again."""
    where, numel, node = product.data_ptr(), product.numel(), product.grad_fn

    def pack(kept: Tensor) -> Tensor | torch.Size:
        return kept.shape if kept.data_ptr() == where and kept.numel() == numel else kept

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        # What autograd has for the product's own gradient goes with it, however long somebody holds the loss.
        gate, up = cast(Any, node).saved_tensors
        return halves.product_again(gate.detach(), up.detach()).view(kept)

    return pack, unpack


def is_gated(module: nn.Module) -> bool:
    """Whether the module has the parts of such a block, by the names that families give them."""
    parts = module._modules
    return "down_proj" in parts and ("gate_up_proj" in parts or {"gate_proj", "up_proj"} <= parts.keys())


def _gate_and_up(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    if "gate_up_proj" in module._modules:
        gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
        return gate, up
    gate, up = together([module.gate_proj, module.up_proj], x)
    return gate, up


def fuse_gated(module: nn.Module) -> bool:
    """Mix `FusedGated` in where the module is such a block; says whether. Tried on the module at hand."""
    if not is_gated(module):
        return False
    weight = frozen_weight(cast(nn.Module, module._modules.get("gate_proj", module._modules.get("gate_up_proj"))))
    if weight is None or weight.device.type == "meta":
        return False
    dtype = weight.dense().dtype
    x = torch.linspace(-2, 2, weight.in_features, device=weight.device, dtype=dtype).view(1, 1, -1)
    with torch.no_grad():
        y, (gate, up) = module(x), _gate_and_up(module, x)
        for name in _ACTIVATIONS:
            if torch.allclose(y, cast(nn.Module, module.down_proj)(_Halves(name).composed(gate, up)), rtol=1e-5):
                vars(module)["gated_activation"] = name
                put_on(module, FusedGated)
                return True
    return False
