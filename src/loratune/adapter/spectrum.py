"""What an adapter's factors say, without ever forming a dense delta: spectra, ranks, and what is broken or unused."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loratune.adapter.stacks import KNOWN_BY_BASE, by_expert, stack_problems
from loratune.adapter.value import Factors, SavedAdapter
from loratune.errors import AdapterFileError

# Directions with a singular value below this share of the largest are noise: factors in fp32 are known to 6e-8.
NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one module's update scale · B A, and what follows from them.

    Attributes:
        singular_values: min(r, out, in) of them, largest first.
        norm: ‖ΔW‖ (Frobenius), the root of the sum of their squares.
        effective_rank: see `effective_rank`.
        stable_rank: ‖ΔW‖² / σ₁² (Rudelson and Vershynin, arXiv:math/0503442, section 1); 0 for no update.
        dead: how many of the r directions have a singular value of at most 1e-6 σ₁; all r where the update is zero.
    """

    singular_values: tuple[float, ...]
    norm: float
    effective_rank: float
    stable_rank: float
    dead: int


@dataclass(frozen=True)
class ModuleInspection:
    """One module of an adapter.

    Attributes:
        r, inner, outer: A is (r, inner), B (outer, r), as matrices.
        parameters: of A, B and what stands beside them.
        beside: "bias" and "magnitude", where the module has them.
        zero_components: the j whose row A[j] or column B[:, j] is all zero, so that they add nothing to the update.
        spectrum: None where A or B holds NaN or infinity.
    """

    path: str
    r: int
    inner: int
    outer: int
    scale: float
    parameters: int
    beside: tuple[str, ...]
    zero_components: tuple[int, ...]
    spectrum: Spectrum | None


@dataclass(frozen=True)
class Inspection:
    """What an adapter holds.

    Attributes:
        modules: layer 2 before layer 10.
        parameters: of all tensors.
        norm: root of the sum of the modules' squared norms; None where one of them is not known.
        replaced: tensors that stand in the place of the base's.
        non_finite: tensors that hold NaN or infinity.
    """

    modules: tuple[ModuleInspection, ...]
    parameters: int
    norm: float | None
    replaced: tuple[str, ...]
    non_finite: tuple[str, ...]


def inspect(adapter: SavedAdapter) -> Inspection:
    """Look at every tensor of an adapter; NaN and infinity are named, no error (`read_adapter(…, finite=False)`).

    Each expert of a stack counts as a module.

    Raises:
        AdapterFileError: only the base tells the ranks of a stack.
    """
    problems = list(stack_problems([adapter], ["the adapter"]))
    if problems:
        raise AdapterFileError(problems, hint=KNOWN_BY_BASE)
    adapter = by_expert(adapter)
    modules = tuple(_inspected(adapter, path) for path in sorted(adapter.factors, key=layer_order))
    known = [module.spectrum.norm for module in modules if module.spectrum is not None]
    return Inspection(
        modules=modules,
        parameters=sum(tensor.numel() for _, tensor in adapter.named_tensors()),
        norm=math.hypot(*known) if len(known) == len(modules) and not adapter.vectors else None,
        replaced=tuple(sorted(adapter.replaced)),
        non_finite=tuple(name for name, tensor in adapter.named_tensors() if not tensor.isfinite().all()),
    )


def decomposed(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin singular value decomposition of B A in fp64 on the CPU, from A (r, in) and B (out, r) alone.

    B A = Q_B (R_B R_Aᵀ) Q_Aᵀ with orthonormal Q, so that only a matrix of at most (r, r) is decomposed.

    Returns:
        U (out, n), σ (n,) largest first, Vᵀ (n, in), with n = min(r, out, in).
    """
    Q_A, R_A = torch.linalg.qr(A.detach().cpu().double().T)
    Q_B, R_B = torch.linalg.qr(B.detach().cpu().double())
    U, sigma, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_B @ U, sigma, Vh @ Q_A.T


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """The min(r, out, in) singular values of B A in fp64 on the CPU, largest first, from the factors alone."""
    _, R_A = torch.linalg.qr(A.detach().cpu().double().T)
    _, R_B = torch.linalg.qr(B.detach().cpu().double())
    values: Tensor = torch.linalg.svdvals(R_B @ R_A.T)
    return values


def effective_rank(A: Tensor, B: Tensor) -> float:
    """exp of the entropy of the normalised singular values; 0 for B A = 0.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality" (2007), definition 1.
    """
    return _effective_rank(singular_values(A, B))


def layer_order(path: str) -> list[tuple[int, str]]:
    """A key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]


def alive(sigma: Tensor) -> int:
    """How many of the singular values, largest first, are not negligible beside the largest."""
    return int((sigma > NEGLIGIBLE * sigma[0]).sum())


def _inspected(adapter: SavedAdapter, path: str) -> ModuleInspection:
    factors = adapter.factors[path]
    A, B = factors.matrices()
    r, inner = A.shape
    scale = adapter.scale(path)
    zero = (A == 0).all(dim=1) | (B == 0).all(dim=0)
    is_finite = bool(A.isfinite().all() and B.isfinite().all())
    return ModuleInspection(
        path=path,
        r=r,
        inner=inner,
        outer=factors.B.shape[0],
        scale=scale,
        parameters=sum(tensor.numel() for _, tensor in factors.tensors()),
        beside=tuple(name for name, _ in factors.tensors() if name not in ("A", "B")),
        zero_components=tuple(zero.nonzero().flatten().tolist()),
        spectrum=_spectrum(factors, scale) if is_finite else None,
    )


def _spectrum(factors: Factors, scale: float) -> Spectrum:
    sigma = singular_values(*factors.matrices()) * scale
    norm, largest = float(sigma.norm()), float(sigma[0])
    return Spectrum(
        singular_values=tuple(sigma.tolist()),
        norm=norm,
        effective_rank=_effective_rank(sigma),
        stable_rank=(norm / largest) ** 2 if largest else 0.0,
        dead=factors.A.shape[0] - alive(sigma),
    )


def _effective_rank(sigma: Tensor) -> float:
    total = sigma.sum()
    if float(total) == 0.0:
        return 0.0
    p = sigma / total
    return float(torch.exp(-(p * p.clamp_min(1e-300).log()).sum()))
