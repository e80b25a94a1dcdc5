"""How A and B start. But for `False`, the adapted model computes the base's function."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

Init = bool | str

# Directions that the approximate decomposition follows beyond those that are asked for.
_OVERSAMPLED = 8


def generator_for(seed: int, *names: object) -> torch.Generator:
    """A generator of its own for one tensor: its numbers depend on the seed and the names, on nothing drawn before."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initial_factors(
    init: Init, *, r: int, in_features: int, out_features: int, generator: torch.Generator, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """A (r, in_features) and B (out_features, r / groups) in fp32 on the CPU.

    `True`: A Kaiming-uniform with a = √5, that is U(-1/√in, 1/√in), as peft draws it; B zero.
    `"gaussian"`: A normal with standard deviation 1/r; B zero.
    `"swapped"`: A zero, B as A is by default (Hayou et al., "The impact of initialization on LoRA", arXiv:2406.08447).
    `"orthogonal"`: rows of A and columns of B mixed by halves of one orthogonal matrix, so that B A = 0; r is even.
    `False`: both Kaiming-uniform, so that the adapter changes the output from the start (for tests).
    """
    if init == "orthogonal":
        return _orthogonal(r, in_features, out_features, generator)
    if init == "swapped":
        return _empty(r, in_features).zero_(), _kaiming(out_features, r // groups, generator)
    if init == "gaussian":
        A = _empty(r, in_features).normal_(0.0, 1.0 / r, generator=generator)
    else:
        A = _kaiming(r, in_features, generator)
    columns = r // groups
    B = _kaiming(out_features, columns, generator) if init is False else _empty(out_features, columns).zero_()
    return A, B


def lookup_factors(
    init: Init, *, r: int, in_features: int, out_features: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A (r, in_features) and B (out_features, r) of an embedding: A zero and B from N(0, 1); both for `False`."""
    A, B = _empty(r, in_features), _empty(out_features, r).normal_(generator=generator)
    return (A.normal_(generator=generator) if init is False else A.zero_()), B


def decomposed_factors(
    init: str, weight: Tensor, *, r: int, scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) in fp32 from a decomposition of `weight` (out, in), on its device.

    `"pissa"`: s · B A is the best approximation of W of rank r, its singular values shared by both factors (Meng et
    al., arXiv:2404.02948, equations 2 and 3); `"pissa_niter_N"` approximates it by N rounds of subspace iteration.
    `"olora"`: B the first r columns of Q and A the first r rows of R in W = Q R (Büyükakyüz, arXiv:2406.01775).
    """
    W = weight.detach().float()
    if init == "olora":
        Q, R = torch.linalg.qr(W)
        return R[:r].contiguous(), Q[:, :r].contiguous()
    rounds = init.removeprefix("pissa_niter_")
    if rounds == init:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, Vh = leading_directions(W, r + _OVERSAMPLED, rounds=int(rounds), generator=generator)
    return _shared(U, S, Vh, r, scale)


def _shared(U: Tensor, S: Tensor, Vh: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """The leading r directions as A and B, the singular values shared by both."""
    root = (S[:r] / scale).sqrt()
    return (root[:, None] * Vh[:r]).contiguous(), (U[:, :r] * root).contiguous()


def residual_factors(residual: Tensor, *, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) in fp32 with s · B A the best approximation of rank r of `residual` (out, in).

    With what quantising a weight lost as the residual it is LoftQ of one round (Li et al., arXiv:2310.08659, algorithm
    1); more rounds would quantise another matrix than the base's, which all adapters share.
    """
    U, S, Vh = torch.linalg.svd(residual.detach().float(), full_matrices=False)
    return _shared(U, S, Vh, r, scale)


def leading_directions(
    W: Tensor, width: int, *, rounds: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular directions of W (out, in), approximately: U (out, width), σ, Vᵀ (width, in) in its dtype.

    Halko, Martinsson and Tropp, "Finding structure with randomness" (arXiv:0909.4061), algorithms 4.4 and 5.1.

    Args:
        width: how many; the last of them are the least certain, so ask for more than are needed.
        rounds: of subspace iteration.
        generator: of the CPU.
    """
    width = min(width, *W.shape)
    start = torch.randn(W.shape[1], width, generator=generator, dtype=W.dtype, device="cpu")
    Q, _ = torch.linalg.qr(W @ start.to(W.device))
    for _ in range(rounds):
        P, _ = torch.linalg.qr(W.T @ Q)
        Q, _ = torch.linalg.qr(W @ P)
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return Q @ U, S, Vh


def _orthogonal(r: int, in_features: int, out_features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    Q, _ = torch.linalg.qr(_empty(r, r).normal_(generator=generator))
    A = _empty(in_features, r // 2).normal_(generator=generator) @ Q[0::2]
    B = _empty(out_features, r // 2).normal_(generator=generator) @ Q[1::2]
    return A.T.contiguous() / 10, B / 10


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    bound = 1.0 / math.sqrt(columns)
    return _empty(rows, columns).uniform_(-bound, bound, generator=generator)


def _empty(rows: int, columns: int) -> Tensor:
    # Said outright: loaders set a default dtype and device while they build a model.
    return torch.empty(rows, columns, dtype=torch.float32, device="cpu")
