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

# With fewer rows a tile is hardly filled; of a longer sum there is room for the right factors of a few columns only.
_FEWEST, _LONGEST = 32, 6144

Product = tuple[Tensor, Tensor]


def sum_of_products(products: Sequence[Product], scale: float = 1.0, into: Tensor | None = None) -> Tensor:
    """scale · Σ x w, or that added to what is there.

    Args:
        products: of x (rows, inner) and w (inner, columns), all of one dtype.
        into: (rows, columns), what the sum is added to and where it goes; a new tensor unless told.
    """
    found = sum_in_tiles(products, scale, into)
    if found is not None:
        return found
    for x, w in products:
        if into is None:
            into = torch.mm(x, w)
            into = into if scale == 1.0 else into.mul_(scale)
        else:
            into.addmm_(x, w, alpha=scale)
    assert into is not None, "a sum has a product at least"
    return into


def sum_in_tiles(products: Sequence[Product], scale: float = 1.0, into: Tensor | None = None) -> Tensor | None:
    """The same where it is computed in tiles; else None, and nothing was done."""
    rows, columns = products[0][0].shape[0], products[0][1].shape[1]
    if any(x.shape != (rows, w.shape[0]) or w.shape[1] != columns for x, w in products):
        return None  # torch says what does not fit
    if into is not None and into.shape != (rows, columns):
        return None
    kernels = _kernels_of(products, into)
    if kernels is None:
        return None
    found: Tensor = kernels.sum_of_products(products, scale, into)
    return found


def product_over_rows(u: Tensor, v: Tensor) -> Tensor:
    """uᵀ v of (rows, m) and (rows, n): (m, n), in fp32 where nothing was rounded on the way."""
    kernels = _tiles([u, v], []) if u.shape[0] == v.shape[0] else None
    if kernels is not None:
        found: Tensor = kernels.product_over_rows(u, v)
        return found
    return torch.mm(u.T, v)


def has_tiles(products: Sequence[Product]) -> bool:
    """Whether their sum is computed in tiles; not where autograd would have to know of it."""
    return _kernels_of(products) is not None


def _kernels_of(products: Sequence[Product], into: Tensor | None = None) -> ModuleType | None:
    if sum(x.shape[1] for x, _ in products) > _LONGEST:
        return None
    by_row = [x for x, _ in products]
    return _tiles(by_row if into is None else [*by_row, into], [w for _, w in products])


def _tiles(by_row: Sequence[Tensor], either: Sequence[Tensor]) -> ModuleType | None:
    """The kernels, if they have products of these in tiles: matrices whose rows are contiguous, and rows or columns."""
    first = by_row[0]
    if first.dtype != torch.bfloat16 or not first.is_cpu or first.shape[0] < _FEWEST:
        return None
    with_gradients = torch.is_grad_enabled()
    for tensors, turned in ((by_row, False), (either, True)):
        for t in tensors:
            if not has_plain_memory(t) or t.dtype != torch.bfloat16 or not t.is_cpu or not t.numel():
                return None
            if t.stride(1) != 1 and not (turned and t.stride(0) == 1):
                return None
            if with_gradients and t.requires_grad:
                return None
    kernels = kernels_for(first)
    return kernels if kernels is not None and kernels.in_tiles(torch.bfloat16) else None
