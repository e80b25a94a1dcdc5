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


class LowRank(nn.Module):
    """One adapter on one layer.

    Attributes:
        A: (r, in_features), B: (out_features, r); masters in fp32 unless another dtype was asked for.
        scale: the factor s of the update.
        dropout: probability with which an input feature of A is dropped in training.
    """

    def __init__(self, A: Tensor, B: Tensor, *, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.scale = scale
        self.dropout = dropout

    @property
    def r(self) -> int:
        return self.A.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """s · B A x for x (..., in_features), computed in x's dtype (or autocast's); returns (..., out_features)."""
        # Scaling the rank-r product costs r multiplications a token; scaling the result would cost out_features.
        return F.linear(F.linear(x, self.A.to(x.dtype)) * self.scale, self.B.to(x.dtype))

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """s · B A as a dense (out_features, in_features) matrix, detached, computed in `dtype`."""
        return (self.B.detach().to(dtype) @ self.A.detach().to(dtype)) * self.scale

    def extra_repr(self) -> str:
        (r, inner), outer = self.A.shape, self.B.shape[0]
        return f"r={r}, in={inner}, out={outer}, scale={self.scale:g}, dropout={self.dropout:g}"

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):  # type: ignore[no-untyped-def]
        # A checkpoint of the base alone still loads into an adapted model: the adapter then stays what it is.
        # One tensor without the other is a damaged checkpoint and is reported as missing.
        if prefix + "A" not in state_dict and prefix + "B" not in state_dict:
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
