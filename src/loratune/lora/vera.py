"""y = W x + b ⊙ B (d ⊙ (A x)): A and B are random, frozen and the same for all layers; the vectors d and b train.

Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation" (arXiv:2310.11454), section 3.1, equation 2. It is a
low-rank update of the factors diag(d) A and diag(b) B, and whatever knows those knows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loratune.kernels import product_over_rows, sum_of_products
from loratune.lora.equation import LowRank
from loratune.lora.linear import Frozen, Linear, Weight, of_input, refuse_changed


class Projections(nn.Module):
    """A (r, widest in) and B (widest out, r) of one adapter, of which a layer has the first columns and rows."""

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Projections:
        """Follows one layer to its device, and to no other dtype: it is the other layers' too."""
        del recurse
        for name, buffer in (("A", self.A), ("B", self.B)):
            device = fn(buffer.new_empty(0)).device
            self._buffers[name] = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
        return self


def random_projections(r: int, in_features: int, out_features: int, seed: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) in fp32, Kaiming uniform (variance 2 / columns), as peft 0.21.2 draws them."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def drawn(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(6 / columns)
        return torch.empty(rows, columns, device="cpu").uniform_(-bound, bound, generator=generator)

    A = drawn(r, in_features)
    return A, drawn(out_features, r)


class Vera(LowRank):
    """One layer's vectors.

    Attributes:
        d: (r,), between A and B. b: (out_features,), behind B.
        projections: the A and B of all layers.
    """

    d: nn.Parameter
    b: nn.Parameter

    def __init__(self, d: Tensor, b: Tensor, projections: Projections, in_features: int, dropout: float = 0.0) -> None:
        nn.Module.__init__(self)
        self._parameters.update(d=nn.Parameter(d), b=nn.Parameter(b), bias=None, magnitude=None)
        self._buffers.update(A0=None, B0=None)
        self.projections = projections
        self.in_features = in_features
        self.scale = 1.0
        self.dropout = dropout

    @property
    def r(self) -> int:
        return len(self.d)

    @property
    def inner(self) -> nn.Parameter:
        return self.d

    @property
    def outer(self) -> nn.Parameter:
        return self.b

    def frozen(self) -> tuple[Tensor, Tensor]:
        """This layer's A (r, in_features) and B (out_features, r), as they were drawn."""
        A, B = self.projections.A[:, : self.in_features], self.projections.B[: len(self.b)]
        return A.to(self.d.device), B.to(self.b.device)  # layers of one model may be on several

    def factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """diag(d) A and diag(b) B, in the vectors' dtype unless told."""
        A, B = self.frozen()
        d, b = (self.d, self.b) if dtype is None else (self.d.to(dtype), self.b.to(dtype))
        return A.to(d.dtype) * d[:, None], B.to(b.dtype) * b[:, None]

    def extra_repr(self) -> str:
        return f"r={self.r}, in={self.in_features}, out={len(self.b)}, dropout={self.dropout:g}"


class VeraProjection(NamedTuple):
    """base(x) + b ⊙ B (d ⊙ (A x)), of which A is another's too; as `Projection`."""

    base: Linear
    weight: Weight
    bias: Tensor | None
    d: Tensor
    b: Tensor
    B: Tensor


def of_same_input(low_ranks: Sequence[LowRank]) -> bool:
    """Whether all are VeRA's with one A, so that A x is the same for all of them."""
    first = low_ranks[0]
    return isinstance(first, Vera) and all(
        isinstance(other, Vera) and (other.projections, other.in_features, other.r)
        == (first.projections, first.in_features, first.r)
        for other in low_ranks
    )  # fmt: skip


def vera_linears(
    x: Tensor, A: Tensor, projections: Sequence[VeraProjection], dropped: Linear | None = None
) -> tuple[Tensor, ...]:
    """What each projection gives for x (..., in_features), in x's dtype; A x is computed once.

    Under autocast, and where torch draws the dropout, the formula is taken instead, which keeps both.

    Of the frozen factors nothing is kept for the backward pass, nor of x: only A x, (tokens, r), is. So there is no
    gradient of the gradient.

    Raises:
        AdapterStateError: in the backward pass, if a weight has changed since.
    """
    tensors = [tensor for p in projections for tensor in (p.d, p.b, p.bias)]
    found: tuple[Tensor, ...] = _VeraLinears.apply(x, A, projections, dropped, *tensors)  # type: ignore[no-untyped-call]
    return found


class _VeraLinears(torch.autograd.Function):
    """Takes d, b and the bias of each projection one after the other."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, projections: Sequence[VeraProjection], dropped: Linear | None, *_: Tensor | None
    ) -> tuple[Tensor, ...]:
        seen = x if dropped is None else dropped(x)
        h = sum_of_products([(seen.reshape(-1, x.shape[-1]), A.to(x.dtype).T)])
        ys = []
        for p in projections:
            y = p.base(x)
            sum_of_products([(h * p.d.to(h.dtype), _behind(p.b, p.B, h.dtype).T)], into=y.view(-1, y.shape[-1]))
            ys.append(y)
        ctx.save_for_backward(h, A, *(t for p in projections for t in (p.d, p.b, p.B)))
        ctx.frozen = [Frozen(p.weight, p.weight.version, 1.0) for p in projections]
        ctx.dropped, ctx.shape = dropped, x.shape
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, A, *kept = ctx.saved_tensors
        refuse_changed(ctx.frozen)
        flat = [gy.reshape(-1, gy.shape[-1]) for gy in grads]
        gh = torch.zeros_like(h)
        found: list[Tensor | None] = []
        for i, gy in enumerate(flat):
            d, b, B = kept[3 * i : 3 * i + 3]
            wants_d, wants_b, wants_bias = ctx.needs_input_grad[4 + 3 * i : 7 + 3 * i]
            g = sum_of_products([(gy, _behind(b, B, h.dtype))])
            found.append((h * g).sum(0, dtype=d.dtype) if wants_d else None)
            scaled = h * d.to(h.dtype)
            found.append((B * product_over_rows(gy, scaled)).sum(1).to(b.dtype) if wants_b else None)
            found.append(gy.sum(0) if wants_bias else None)
            gh.addcmul_(g, d.to(h.dtype))
        gx = None
        if ctx.needs_input_grad[0]:
            gx = of_input(ctx.frozen, ctx.dropped, ctx.shape, A.to(h.dtype), flat, gh)
        return gx, None, None, None, *found


def _behind(b: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """diag(b) B, rounded once."""
    return (B * b[:, None]).to(dtype)
