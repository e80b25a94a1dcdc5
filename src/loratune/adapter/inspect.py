"""What an adapter's factors say, without ever forming a dense delta."""

from __future__ import annotations

import torch
from torch import Tensor


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """The r singular values of B A in fp64 on the CPU, largest first, from the factors alone.

    B A = Q_B (R_B R_Aᵀ) Q_Aᵀ with orthonormal Q, so the small (r, r) matrix has the same singular values.
    """
    _, right = torch.linalg.qr(A.detach().cpu().double().T)
    _, left = torch.linalg.qr(B.detach().cpu().double())
    values: Tensor = torch.linalg.svdvals(left @ right.T)
    return values


def effective_rank(A: Tensor, B: Tensor) -> float:
    """exp of the entropy of the normalised singular values; 0 for B A = 0.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality" (2007), definition 1.
    """
    sigma = singular_values(A, B)
    total = sigma.sum()
    if float(total) == 0.0:
        return 0.0
    p = sigma / total
    return float(torch.exp(-(p * p.clamp_min(1e-300).log()).sum()))
