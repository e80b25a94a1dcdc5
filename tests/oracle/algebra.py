"""The algebra of adapters with dense matrices in float64; nothing here comes from the package under test.

Formulas: Hu et al. (arXiv:2106.09685, section 7.2, equation 4), Yadav et al. (TIES, arXiv:2306.01708, algorithm 1),
Yu et al. (DARE, arXiv:2311.03099, section 3.1), Eckart and Young (1936).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def delta(A: Array, B: Array, alpha: float, *, rslora: bool = False) -> Array:
    """The dense update of A (r, in) and B (out, r), one rank-one matrix after the other."""
    r = A.shape[0]
    total = np.zeros((B.shape[0], A.shape[1]))
    for j in range(r):
        total += np.outer(B[:, j], A[j])
    return np.asarray(total * (alpha / np.sqrt(r) if rslora else alpha / r))


def weighted_sum(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    total = np.zeros_like(deltas[0])
    for matrix, weight in zip(deltas, weights, strict=True):
        total = total + weight * matrix
    return total


def best_of_rank(matrix: Array, k: int) -> Array:
    U, sigma, Vh = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((U[:, :k] * sigma[:k]) @ Vh[:k])


def norm(matrix: Array) -> float:
    return float(np.sqrt(sum(float(x) ** 2 for x in matrix.flat)))


def relative_error(wanted: Array, found: Array) -> float:
    return norm(wanted - found) / norm(wanted) if norm(wanted) else 0.0


def ties(deltas: Sequence[Array], weights: Sequence[float], density: float) -> Array:
    """Trim, elect, disjoint mean; one entry at a time."""
    trimmed = []
    for matrix, weight in zip(deltas, weights, strict=True):
        scaled = weight * matrix
        keep = max(1, round(density * scaled.size))
        smallest = sorted((abs(float(x)) for x in scaled.flat), reverse=True)[keep - 1]
        trimmed.append(np.where(np.abs(scaled) >= smallest, scaled, 0.0))
    merged = np.zeros(deltas[0].shape)
    for place in np.ndindex(*merged.shape):
        entries = [float(matrix[place]) for matrix in trimmed]
        elected = np.sign(sum(entries))
        agreeing = [x for x in entries if x != 0 and np.sign(x) == elected]
        merged[place] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return merged


def dare(deltas: Sequence[Array], weights: Sequence[float], density: float, kept: Sequence[NDArray[np.bool_]]) -> Array:
    """The sum of w ΔW / density where `kept`, for masks drawn elsewhere."""
    total = np.zeros_like(deltas[0])
    for matrix, weight, mask in zip(deltas, weights, kept, strict=True):
        total = total + weight * np.where(mask, matrix, 0.0) / density
    return total


def cosine(x: Array, y: Array) -> float:
    return float(np.sum(x * y)) / norm(x) / norm(y)


def directions(matrix: Array, *, negligible: float = 1e-6) -> tuple[Array, Array]:
    """Orthonormal left and right singular vectors, as columns, of the singular values that are not negligible."""
    U, sigma, Vh = np.linalg.svd(matrix, full_matrices=False)
    count = int(np.sum(sigma > negligible * sigma[0]))
    return U[:, :count], Vh[:count].T


def overlap(U: Array, V: Array) -> float:
    """φ = ‖Uᵀ V‖² / min(i, j), number by number."""
    total = sum(float(np.dot(u, v)) ** 2 for u in U.T for v in V.T)
    return total / min(U.shape[1], V.shape[1])


def effective_rank(matrix: Array) -> float:
    sigma = np.linalg.svd(matrix, compute_uv=False)
    shares = [x / sigma.sum() for x in sigma if x > 0]
    return float(np.exp(-sum(p * np.log(p) for p in shares)))


def stable_rank(matrix: Array) -> float:
    return float((norm(matrix) / np.linalg.norm(matrix, 2)) ** 2)
