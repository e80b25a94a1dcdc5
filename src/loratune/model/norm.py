"""RMSNorm (Zhang and Sennrich, arXiv:1910.07467, equation 4) that keeps its output instead of its input.

The products after a norm keep the norm's output anyway. Its input follows from it, x / rms = y / w, so that nothing
else but a number for each token has to be kept.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from loratune.kernels import kernels_for
from loratune.lora import put_on
from loratune.model.fused import Fused


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, trained: bool = False) -> Tensor:
    """w · x / √(mean x² + eps) over the last dimension, computed in fp32 at least and rounded once to x's dtype.

    Args:
        x: (..., features); weight: (features,), without zeros unless it is trained.
        trained: whether the weight gets a gradient; x is kept then.
    """
    if not torch.is_grad_enabled():  # nothing is kept, and autograd's own work is more than that of a few tokens
        return _computed(x, weight, eps, kernels_for(x))[0]
    y: Tensor = _RMSNorm.apply(x, weight, eps, trained)  # type: ignore[no-untyped-call]
    return y


def _computed(x: Tensor, weight: Tensor, eps: float, kernels: Any) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = (_forward if kernels is None else kernels.norm_forward)(x, weight, eps)
    return found


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, trained: bool) -> Tensor:
        kernels = kernels_for(x)
        y, inverse = _computed(x, weight, eps, kernels)
        ctx.save_for_backward(x if trained else y, weight, inverse)
        ctx.kernels, ctx.trained = kernels, trained
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        if ctx.trained:
            return *_both_gradients(gy, *kept), None, None
        backward = _backward if ctx.kernels is None else ctx.kernels.norm_backward
        return backward(gy, *kept), None, None, None


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and 1 / rms of each row (..., 1) in fp32 at least."""
    exact = x.to(_wide(x))
    inverse = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (exact * inverse).mul_(weight.to(exact.dtype)).to(x.dtype), inverse


def _backward(gy: Tensor, y: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """With z = x / rms: dx = (w dy - z mean(z · w dy)) / rms, and z · w dy is y · dy."""
    grad, normal, w = gy.to(inverse.dtype), y.to(inverse.dtype), weight.to(inverse.dtype)
    inner: Tensor = torch.linalg.vecdot(grad, normal).unsqueeze(-1).div_(-y.shape[-1])
    return (grad * w).addcmul_(normal * (1 / w), inner).mul_(inverse).to(gy.dtype)


def _both_gradients(gy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Of x, and of the weight: Σ z · dy."""
    grad, z = gy.to(inverse.dtype), x.to(inverse.dtype) * inverse
    of_z = grad * weight.to(inverse.dtype)
    gx = (of_z - z * (z * of_z).mean(-1, keepdim=True)).mul_(inverse)
    return gx.to(gy.dtype), (grad * z).flatten(0, -2).sum(0).to(weight.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class FusedNorm(Fused):
    """Mixed in before a family's RMSNorm. `norm_offset` is what it adds to its weight (1 in Gemma)."""

    settings = ("norm_offset", "norm_eps")
    norm_offset: float
    norm_eps: float

    def forward(self, input: Tensor) -> Tensor:
        weight = cast(Tensor, self.weight)
        if torch.compiler.is_compiling():
            return cast(Tensor, super().forward(input))
        if self.norm_offset:  # in fp32, as the family does: near 1 bf16 has steps of a hundredth
            weight = weight.to(_wide(weight)) + self.norm_offset
        # An adapter's own weight may have zeros, also while it is not being trained.
        trained = self.weight is not self._parameters["weight"] or weight.requires_grad
        return rms_norm(input, weight, self.norm_eps, trained=trained)


def fuse_norm(module: nn.Module) -> bool:
    """Mix `FusedNorm` in where the module is an RMSNorm; says whether.

    Tried on the module at hand, because the families that share the formula share no class.
    """
    weight = module._parameters.get("weight")
    named = (getattr(module, name, None) for name in ("variance_epsilon", "eps", "epsilon"))
    eps = next((value for value in named if isinstance(value, float)), None)
    if weight is None or weight.ndim != 1 or eps is None or weight.requires_grad or weight.is_meta:
        return False
    x = torch.linspace(-2, 3, 2 * weight.numel(), device=weight.device, dtype=weight.dtype).view(1, 2, -1)
    with torch.no_grad():
        y = module(x)
        for offset in (0.0, 1.0):
            factor = weight.to(_wide(weight)) + offset if offset else weight
            if not bool((factor == 0).any()) and torch.allclose(y, rms_norm(x, factor, eps), rtol=_near(x), atol=0.0):
                vars(module).update(norm_offset=offset, norm_eps=eps)
                put_on(module, FusedNorm)
                return True
    return False


def _near(x: Tensor) -> float:
    return 4 * torch.finfo(x.dtype).eps
