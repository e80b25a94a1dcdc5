"""y = W x + s · B A x: the low-rank term, on its own.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), section 4.1, equation 3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def scale_of(r: int, alpha: float, rslora: bool = False) -> float:
    """alpha / r, or alpha / √r with rank-stabilised scaling (Kalajdzievski, arXiv:2312.03732, equation 5)."""
    return alpha / math.sqrt(r) if rslora else alpha / r


def lora_parameters(d: int, k: int, r: int) -> int:
    """Trainable parameters of one adapter of rank `r` on a (d, k) weight: r · (d + k)."""
    return r * (d + k)


# How far the three terms of a row's squared length may be off together, in units of the dtype's rounding: at most 6 was
# seen up to 4,096 columns, 15 at 16,384, with ranks from 4 to 64 and updates that cancel the weight.
_ROUNDINGS = 16


class LowRank(nn.Module):
    """One adapter on one layer.

    Attributes:
        A: (r, in_features), B: (out_features, r); masters in fp32 unless another dtype was asked for. Of a convolution
            A is (r, in, *kernel) and B (out, r / groups, 1, ...), and `as_matrices` says what they are.
        bias: (out_features,), trained behind B and scaled with it, or None.
        magnitude: (out_features,), the length of each row of the adapted weight (DoRA), or None.
        A0, B0: where A and B started, if the update counts from there (PiSSA, OLoRA); else None.
        scale: the factor s of the update.
        dropout: probability with which an input feature of A is dropped in training.
    """

    A: nn.Parameter
    B: nn.Parameter
    bias: nn.Parameter | None
    magnitude: nn.Parameter | None
    A0: Tensor | None
    B0: Tensor | None

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        *,
        scale: float,
        dropout: float = 0.0,
        bias: Tensor | None = None,
        magnitude: Tensor | None = None,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        assert bias is None or magnitude is None, "what DoRA does to a bias behind B is not defined"
        # Registered by hand: there are hundreds of these in a model, and each way through `nn.Module.__setattr__` first
        # fails to find the name elsewhere.
        beside = {"bias": bias, "magnitude": magnitude}
        self._parameters.update(A=nn.Parameter(A), B=nn.Parameter(B))
        self._parameters.update({name: None if t is None else nn.Parameter(t) for name, t in beside.items()})
        self._buffers.update(A0=start and start[0], B0=start and start[1])
        self.scale = scale
        self.dropout = dropout

    @property
    def r(self) -> int:
        return self.A.shape[0]

    @property
    def inner(self) -> nn.Parameter:
        """What an input meets first of the two that train."""
        return self.A

    @property
    def outer(self) -> nn.Parameter:
        return self.B

    def factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of which the update is s · B A, in their own dtype unless told.

        An update that counts from its start, B A - B₀ A₀, is (B - B₀) A + B₀ (A - A₀): one product of rank 2r of terms
        as small as the change, so that nothing cancels in low precision and the start is exactly zero.
        """
        A, B = (self.A, self.B) if dtype is None else (self.A.to(dtype), self.B.to(dtype))
        if self.A0 is None or self.B0 is None:
            return A, B
        A0, B0 = self.A0.to(A.dtype), self.B0.to(B.dtype)
        return torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)

    def matrices(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The factors as matrices, of which the update's is s · B A."""
        return as_matrices(*self.factors(dtype))

    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """The factors of each weight that the update is added to: there is one, but in a stack."""
        return [self.matrices()]

    def forward(self, x: Tensor) -> Tensor:
        """s · (B A x + bias) for x (..., in_features), computed in x's dtype (or autocast's): (..., out_features)."""
        A, B = self.factors()
        # Scaling the rank-r product costs r multiplications a token; scaling the result would cost out_features.
        y = F.linear(F.linear(x, A.to(x.dtype)) * self.scale, B.to(x.dtype))
        return y if self.bias is None else y + (self.bias * self.scale).to(y.dtype)

    def delta(self, weight: Tensor) -> Tensor:
        """What is added to `weight` (out_features, in_features), detached, in its dtype: s · B A.

        With a magnitude m: (m / ‖W + s B A‖) (W + s B A) - W, norms by rows (Liu et al., DoRA, arXiv:2402.09353,
        equation 5).
        """
        A, B = (factor.detach() for factor in self.matrices(weight.dtype))
        update = (B @ A) * self.scale
        if self.magnitude is None:
            return update
        return self.stretch(weight).detach()[:, None] * (weight + update) - weight

    def stretch(self, weight: Tensor) -> Tensor:
        """m / ‖W + s B A‖ by rows: (out_features,), in fp32 at least.

        The norm counts as a constant (arXiv:2402.09353, section 4.3), and it comes from
        ‖W‖² + 2s ⟨W, B A⟩ + s² ‖B A‖², so that no dense B A is formed. Its square is known to 16 roundings of
        ‖W‖² + s² ‖B A‖², and where an update cancels more of the weight than that, it counts as that much: in fp32
        the norm is at least 0.0014 √(‖W‖² + s² ‖B A‖²).
        """
        assert self.magnitude is not None
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            W = weight if weight.dtype == torch.float64 else weight.float()
            A, B = self.matrices(W.dtype)
            base = (W * W).sum(1)
            cross = 2 * self.scale * ((W @ A.T) * B).sum(1)
            own = (self.scale**2 * ((B @ (A @ A.T)) * B).sum(1)).clamp_min(0)
            known_to = _ROUNDINGS * torch.finfo(W.dtype).eps * (base + own)
            norm = (base + cross + own).maximum(known_to).sqrt()
            norm = norm.where(norm > 0, 1.0)  # a row of zeros has no direction; its length stays zero too
        return self.magnitude.to(norm.dtype) / norm

    def bias_delta(self, bias: Tensor) -> Tensor | None:
        """What is added to the layer's own bias (out_features,), detached, in its dtype; None where nothing is."""
        return None if self.bias is None else self.bias.detach().to(bias.dtype) * self.scale

    def extra_repr(self) -> str:
        r, inner = self.A.flatten(1).shape
        return f"r={r}, in={inner}, out={len(self.B)}, scale={self.scale:g}, dropout={self.dropout:g}"

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):  # type: ignore[no-untyped-def]
        # A checkpoint of the base alone still loads into an adapted model: the adapter then stays what it is.
        # Some of its tensors without the others are a damaged checkpoint and are reported as missing.
        if any(prefix + name in state_dict for name in (*self._parameters, *self._buffers)):
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


def as_matrices(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A (r, columns) and B (out, r) of factors that may be kernels: A's flattened, B's blocks on the diagonal."""
    A, B = A.flatten(1), B.flatten(1)
    if B.shape[1] == len(A):
        return A, B
    groups = len(A) // B.shape[1]
    return A, torch.block_diag(*B.view(groups, -1, B.shape[1]))


def row_norms(weight: Tensor) -> Tensor:
    """The length of each row of a (out_features, in_features) weight, as `stretch` computes it: DoRA's start."""
    W = weight if weight.dtype == torch.float64 else weight.float()
    return (W * W).sum(1).sqrt()
