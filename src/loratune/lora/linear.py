"""W x + s · B A x as one step of autograd: three products forward and five backward, keeping x and the rank-r product.

Autograd's own way through the same formula keeps a second copy of x where A and B are finer than it, adds what it could
accumulate, and writes every intermediate result. The frozen weight is read again in the backward pass, so that nothing
of it is kept, however it is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from loratune.errors import AdapterStateError

Linear = Callable[[Tensor], Tensor]


class Weight(Protocol):
    """What the equation asks of a frozen weight, however it is stored."""

    @property
    def version(self) -> int:
        """Grows with every change in place."""
        ...

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out_features, in_features), in the stored dtype unless told."""
        ...


def lora_linear(
    x: Tensor,
    base: Linear,
    weight: Weight,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    dropped: Linear | None = None,
) -> Tensor:
    """base(x) + s · B A dropped(x), computed in x's dtype with A and B rounded to it.

    Args:
        x: (..., in_features), of the dtype that `base` computes in.
        base: x ↦ W x + b, of which b is `bias` and W is `weight`, which gets no gradient.
        A: (r, in_features), B: (out_features, r), in their masters' dtype.
        dropped: what A sees instead of x; linear, and the same whenever it is called.

    Raises:
        AdapterStateError: in the backward pass, if the weight has changed since.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, bias, A, B) if t is not None):
        y: Tensor = _LoraLinear.apply(x, A, B, bias, base, weight, scale, dropped)  # type: ignore[no-untyped-call]
        return y
    return _add(base(x), _inner(x, A, scale, dropped), B)


def _inner(x: Tensor, A: Tensor, scale: float, dropped: Linear | None) -> Tensor:
    """s · A x: (tokens, r). Scaling it costs r multiplications a token, scaling the result would cost out_features."""
    seen = x if dropped is None else dropped(x)
    return torch.mm(seen.reshape(-1, x.shape[-1]), A.to(x.dtype).T).mul_(scale)


def _add(y: Tensor, h: Tensor, B: Tensor) -> Tensor:
    y.view(-1, y.shape[-1]).addmm_(h, B.to(h.dtype).T)
    return y


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,  # noqa: ARG004  # `base` adds it; named here for its gradient
        base: Linear,
        weight: Weight,
        scale: float,
        dropped: Linear | None,
    ) -> Tensor:
        h = _inner(x, A, scale, dropped)
        ctx.save_for_backward(x, A, B, h)
        ctx.weight, ctx.version, ctx.scale, ctx.dropped = weight, weight.version, scale, dropped
        return _add(base(x), h, B)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, h = ctx.saved_tensors
        if ctx.weight.version != ctx.version:
            raise AdapterStateError(
                "a weight changed between a forward pass and its backward pass", hint="merge and load between steps"
            )
        if torch.is_grad_enabled():  # somebody wants the gradient's gradient
            return *_differentiable(ctx, x, A, B, gy), None, None, None, None
        gy = gy.reshape(-1, gy.shape[-1])
        gx = gA = gB = gb = None
        if ctx.needs_input_grad[2]:
            gB = torch.mm(gy.T, h).to(B.dtype)
        if ctx.needs_input_grad[3]:
            gb = gy.sum(0)
        gh = torch.mm(gy, B.to(gy.dtype)).mul_(ctx.scale)
        if ctx.needs_input_grad[1]:
            seen = x if ctx.dropped is None else ctx.dropped(x)
            gA = torch.mm(gh.T, seen.reshape(-1, x.shape[-1])).to(A.dtype)
        if ctx.needs_input_grad[0]:
            gx = torch.mm(gy, ctx.weight.dense(gy.dtype))
            if ctx.dropped is None:
                gx.addmm_(gh, A.to(gh.dtype))
                gx = gx.view(x.shape)
            else:
                gx = gx.view(x.shape) + ctx.dropped(torch.mm(gh, A.to(gh.dtype)).view(x.shape))
        return gx, gA, gB, gb, None, None, None, None


def _differentiable(ctx: Any, x: Tensor, A: Tensor, B: Tensor, gy: Tensor) -> tuple[Tensor | None, ...]:
    """The same gradients by operations that have gradients themselves."""
    dropped = ctx.dropped or (lambda t: t)
    A_x, B_x = A.to(x.dtype), B.to(x.dtype)
    gh = (gy @ B_x) * ctx.scale
    flat_gy, flat_gh, seen = (t.reshape(-1, t.shape[-1]) for t in (gy, gh, dropped(x)))
    h = (seen @ A_x.T) * ctx.scale
    gx = gy @ ctx.weight.dense(gy.dtype) + dropped(gh @ A_x)
    gradients = (gx, (flat_gh.T @ seen).to(A.dtype), (flat_gy.T @ h).to(B.dtype), flat_gy.sum(0))
    return tuple(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False))
