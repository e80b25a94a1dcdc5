"""W x + s · B A x as one step of autograd, of one projection or of several that see the same x.

Autograd's own way through the same formula keeps a second copy of x where A and B are finer than it, adds what it could
accumulate, and writes every intermediate result. Here a projection takes three products forward and five backward, and
keeps x and the rank-r product; several together have one product with all of their As, and accumulate the gradient of x
in place. The frozen weight is read again in the backward pass, so that nothing of it is kept, however it is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from loratune.errors import AdapterStateError
from loratune.kernels import (
    Adapted,
    adapted_in_tiles,
    gradients_in_tiles,
    product_over_rows,
    sum_in_tiles,
    sum_of_products,
)

Linear = Callable[[Tensor], Tensor]


class Weight(Protocol):
    """What the equation asks of a frozen weight, however it is stored."""

    @property
    def version(self) -> int:
        """Grows with every change in place."""
        ...

    @property
    def lasting(self) -> bool:
        """Whether what is lent, in its own dtype, may be held while the next one is: it takes no memory of its own."""
        ...

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out_features, in_features), in the stored dtype unless told."""
        ...

    def lent(self, dtype: torch.dtype | None = None) -> Tensor:
        """The same for one product: the next one that is lent on this thread may be written in its place."""
        ...

    def computed_by(self, forward: Callable[..., Any]) -> bool:
        """Whether `forward`, of the module's class, computes W x + b and nothing else."""
        ...


class Projection(NamedTuple):
    """base(x) + s · B A x.

    Attributes:
        base: x ↦ W x + b, of which b is `bias` and W is `weight`, which gets no gradient.
        A: (r, in_features), B: (out_features, r), in their masters' dtype.
        scale: s.
        tiled: whether base(x) is `base_product`, so that all of it may be one sum.
    """

    base: Linear
    weight: Weight
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float
    tiled: bool = False


class Frozen(NamedTuple):
    """What the backward pass needs of a projection beside the tensors that autograd keeps."""

    weight: Weight
    version: int
    scale: float


def lora_linears(x: Tensor, projections: Sequence[Projection], dropped: Linear | None = None) -> tuple[Tensor, ...]:
    """What each projection gives for x, computed in x's dtype with A and B rounded to it.

    Args:
        x: (..., in_features), of the dtype that the bases compute in.
        dropped: what the As see instead of x; linear, and the same whenever it is called.

    Raises:
        AdapterStateError: in the backward pass, if a weight has changed since.
    """
    tensors = [tensor for p in projections for tensor in (p.A, p.B, p.bias)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors) if t is not None):
        found: tuple[Tensor, ...] = _LoraLinears.apply(x, projections, dropped, *tensors)  # type: ignore[no-untyped-call]
        return found
    return _computed(x, projections, dropped).ys


class _Computed(NamedTuple):
    """What a forward pass gives, and made on the way: s · A x of all beside each other, (tokens, Σ r), and, where
    torch saw them, the rounded factors."""

    ys: tuple[Tensor, ...]
    h: Tensor
    rounded: Sequence[Tensor] = ()


def _computed(x: Tensor, projections: Sequence[Projection], dropped: Linear | None) -> _Computed:
    # All weights at once: each has to last until the others are there.
    if dropped is None and all(p.tiled and p.weight.lasting for p in projections):
        told = [Adapted(p.weight.lent(x.dtype), p.A, p.B, p.scale, p.bias) for p in projections]
        found = adapted_in_tiles(x.reshape(-1, x.shape[-1]), told)
        if found is not None:
            return _Computed(tuple(y.view(*x.shape[:-1], y.shape[1]) for y in found[0]), found[1])
    rounded = _rounded([p.A for p in projections], [p.B for p in projections], x.dtype)
    h = _inner(x, rounded[0], projections, dropped)
    parts = h.split([len(p.A) for p in projections], 1)
    ys = tuple(_with_update(x, p, part, B) for p, part, B in zip(projections, parts, rounded[1:], strict=True))
    return _Computed(ys, h, rounded)


def _rounded(As: Sequence[Tensor], Bs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The As below each other (Σ r, in_features), and each B."""
    A = [A.to(dtype) for A in As]
    return [A[0] if len(A) == 1 else torch.cat(A), *(B.to(dtype) for B in Bs)]


def _inner(x: Tensor, A: Tensor, projections: Sequence[Projection], dropped: Linear | None) -> Tensor:
    """s · A x of each, (tokens, r), beside each other.

    Scaling it costs r multiplications a token, scaling the result would cost out_features.
    """
    seen = (x if dropped is None else dropped(x)).reshape(-1, x.shape[-1])
    scales = [p.scale for p in projections]
    if len(set(scales)) == 1:
        return sum_of_products([(seen, A.T)], scales[0])
    As = A.split([len(p.A) for p in projections])
    return torch.cat([sum_of_products([(seen, A.T)], scale) for A, scale in zip(As, scales, strict=True)], 1)


def _with_update(x: Tensor, p: Projection, h: Tensor, B: Tensor) -> Tensor:
    """base(x) + h Bᵀ; the terms of B come last, so that one of zeros changes no bit."""
    if p.tiled:
        found = sum_in_tiles([*base_product(x, p.weight.lent(x.dtype), p.bias), (h, B.T)])
        if found is not None:
            return found.view(*x.shape[:-1], B.shape[0])
    y = p.base(x)
    sum_of_products([(h, B.T)], into=y.view(-1, y.shape[-1]))
    return y


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """x Wᵀ + b as products to be summed."""
    flat = x.reshape(-1, x.shape[-1])
    return [(flat, weight.T), *([] if bias is None else [(flat.new_ones(flat.shape[0], 1), bias[None])])]


class _LoraLinears(torch.autograd.Function):
    """Takes A, B and the bias of each projection one after the other; the biases are added by the bases themselves."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, projections: Sequence[Projection], dropped: Linear | None, *_: Tensor | None
    ) -> tuple[Tensor, ...]:
        ys, h, rounded = _computed(x, projections, dropped)
        ctx.save_for_backward(x, h, *(p.A for p in projections), *(p.B for p in projections), *rounded)
        ctx.frozen = [Frozen(p.weight, p.weight.version, p.scale) for p in projections]
        ctx.dropped = dropped
        return ys

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, h, *kept = ctx.saved_tensors
        number = len(ctx.frozen)
        As, Bs, rounded = kept[:number], kept[number : 2 * number], kept[2 * number :]
        refuse_changed(ctx.frozen)
        if torch.is_grad_enabled():  # somebody wants the gradient's gradient
            return _differentiable(ctx, x, As, Bs, grads)
        flat = [gy.reshape(-1, gy.shape[-1]) for gy in grads]
        gradients = _gradients_in_tiles(ctx, x, h, As, Bs, flat)
        if gradients is None:
            gradients = _gradients(ctx, x, h, As, rounded or _rounded(As, Bs, x.dtype), flat)
        gx, gAs, gBs = gradients
        found: list[Tensor | None] = []
        for gy, gA, gB, A, B, wants in zip(flat, gAs, gBs, As, Bs, ctx.needs_input_grad[5::3], strict=True):
            found += [None if g is None else g.to(own.dtype) for g, own in ((gA, A), (gB, B))]
            found.append(gy.sum(0) if wants else None)
        return gx if gx is None else gx.view(x.shape), None, None, *found


# Of x, of each A and of each B; none where it is not wanted.
Gradients = tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]


def _gradients(
    ctx: Any, x: Tensor, h: Tensor, As: Sequence[Tensor], rounded: Sequence[Tensor], flat: Sequence[Tensor]
) -> Gradients:
    """By one product after the other."""
    A, *Bs = rounded
    ghs = [sum_of_products([(gy, B)], base.scale) for gy, B, base in zip(flat, Bs, ctx.frozen, strict=True)]
    gh = ghs[0] if len(ghs) == 1 else torch.cat(ghs, 1)
    gx = of_input(ctx.frozen, ctx.dropped, x.shape, A, flat, gh) if ctx.needs_input_grad[0] else None
    ranks, wants_A, wants_B = [len(own) for own in As], ctx.needs_input_grad[3::3], ctx.needs_input_grad[4::3]
    gAs: Sequence[Tensor | None] = [None] * len(As)
    if any(wants_A):
        seen = x if ctx.dropped is None else ctx.dropped(x)
        each = product_over_rows(gh, seen.reshape(-1, x.shape[-1])).split(ranks)
        # Each a tensor of its own: who keeps or writes one gradient does not want the others with it.
        gAs = [
            part.to(own.dtype, copy=len(As) > 1) if wants else None
            for part, own, wants in zip(each, As, wants_A, strict=True)
        ]
    parts = zip(flat, h.split(ranks, 1), wants_B, strict=True)
    return gx, gAs, [product_over_rows(gy, part) if wants else None for gy, part, wants in parts]


def _gradients_in_tiles(
    ctx: Any, x: Tensor, h: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor], flat: Sequence[Tensor]
) -> Gradients | None:
    """By a kernel, where there is one for it."""
    if ctx.dropped is not None or not all(base.weight.lasting for base in ctx.frozen):
        return None
    told = [Adapted(base.weight.lent(x.dtype), A, B, base.scale) for base, A, B in zip(ctx.frozen, As, Bs, strict=True)]
    needed = ctx.needs_input_grad
    wanted = list(zip(needed[3::3], needed[4::3], strict=True))
    return gradients_in_tiles(x.reshape(-1, x.shape[-1]), h, flat, told, wanted, wants_x=needed[0])


def refuse_changed(frozen: Sequence[Frozen]) -> None:
    """Raise where a weight is not what it was in the forward pass."""
    if any(base.weight.version != base.version for base in frozen):
        raise AdapterStateError(
            "a weight changed between a forward pass and its backward pass", hint="merge and load between steps"
        )


def of_input(
    frozen: Sequence[Frozen], dropped: Linear | None, shape: torch.Size, A: Tensor, grads: Sequence[Tensor], gh: Tensor
) -> Tensor:
    """The gradient of x, Σ Wᵀ gy + Aᵀ gh, in its shape; gy are (tokens, out), gh (tokens, r)."""
    gx: Tensor | None = None
    products: list[tuple[Tensor, Tensor]] = []
    for base, gy in zip(frozen, grads, strict=True):
        products.append((gy, base.weight.lent(gh.dtype)))
        if not base.weight.lasting:
            gx, products = sum_of_products(products, into=gx), []
    if dropped is None:
        return sum_of_products([*products, (gh, A)], into=gx).view(shape)
    gx = sum_of_products(products, into=gx) if products else gx
    assert gx is not None, "there is a projection at least"
    update: Tensor = dropped(sum_of_products([(gh, A)]).view(shape))
    return update.add_(gx.view(shape))


def _differentiable(
    ctx: Any, x: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The same gradients by operations that have gradients themselves."""
    dropped = ctx.dropped or (lambda t: t)
    seen = dropped(x).reshape(-1, x.shape[-1])
    gx: Tensor | None = None
    found: list[Tensor | None] = []
    for base, A, B, gy in zip(ctx.frozen, As, Bs, grads, strict=True):
        A_x, B_x, flat = A.to(x.dtype), B.to(x.dtype), gy.reshape(-1, gy.shape[-1])
        gh, h = (flat @ B_x) * base.scale, (seen @ A_x.T) * base.scale
        part = gy @ base.weight.dense(gy.dtype) + dropped((gh @ A_x).view(x.shape))
        gx = part if gx is None else gx + part
        found += [(gh.T @ seen).to(A.dtype), (flat.T @ h).to(B.dtype), flat.sum(0)]
    return tuple(
        g if wanted else None for g, wanted in zip((gx, None, None, *found), ctx.needs_input_grad, strict=True)
    )
