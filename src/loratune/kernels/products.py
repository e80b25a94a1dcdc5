"""Sums of products, and products over tokens: what the equation of low-rank adaptation multiplies.

By a processor's matrix unit where it has one, each number summed in fp32 and rounded once (`c_products.c`); else by
torch, one product after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from loratune.kernels.chosen import has_plain_memory, kernels_for

# With fewer rows a tile is hardly filled.
_FEWEST = 32

Product = tuple[Tensor, Tensor]


def sum_of_products(products: Sequence[Product], scale: float = 1.0, into: Tensor | None = None) -> Tensor:
    """scale · Σ x w, or that added to what is there.

    Args:
        products: of x (rows, inner) and w (inner, columns), all of one dtype.
        into: (rows, columns), what the sum is added to and where it goes; a new tensor unless told.
    """
    rows, columns = len(products[0][0]), products[0][1].shape[1]
    fits = all(x.shape == (rows, len(w)) and w.shape[1] == columns for x, w in products)
    by_row = [x for x, _ in products] if into is None else [*(x for x, _ in products), into]
    if fits and (into is None or into.shape == (rows, columns)):  # else torch says what does not
        kernels = _tiles(by_row, [w for _, w in products])
        if kernels is not None:
            found: Tensor = kernels.sum_of_products(products, scale, into)
            return found
    for x, w in products:
        if into is None:
            into = torch.mm(x, w)
            into = into if scale == 1.0 else into.mul_(scale)
        else:
            into.addmm_(x, w, alpha=scale)
    assert into is not None, "a sum has a product at least"
    return into


def product_over_rows(u: Tensor, v: Tensor) -> Tensor:
    """uᵀ v of (rows, m) and (rows, n): (m, n), in fp32 where nothing was rounded on the way."""
    kernels = _tiles([u, v], []) if len(u) == len(v) else None
    if kernels is not None:
        found: Tensor = kernels.product_over_rows(u, v)
        return found
    return torch.mm(u.T, v)


def has_tiles(by_row: Sequence[Tensor], either: Sequence[Tensor]) -> bool:
    """Whether products of these are computed in tiles: matrices whose rows are contiguous, and rows or columns.

    Not where autograd would have to know of it.
    """
    return _tiles(by_row, either) is not None


def _tiles(by_row: Sequence[Tensor], either: Sequence[Tensor]) -> ModuleType | None:
    """The kernels, if they have products of these in tiles."""
    all_of_them = [*by_row, *either]
    if len(by_row[0]) < _FEWEST or not all(t.dtype == torch.bfloat16 and t.is_cpu and t.numel() for t in all_of_them):
        return None
    if any(t.stride(1) != 1 for t in by_row) or any(1 not in t.stride() for t in either):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in all_of_them):
        return None
    kernels = kernels_for(by_row[0])
    if kernels is None or not kernels.in_tiles(torch.bfloat16):
        return None
    return kernels if all(has_plain_memory(t) for t in all_of_them[1:]) else None
