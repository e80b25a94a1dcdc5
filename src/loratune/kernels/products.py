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
_FEWEST, LONGEST = 32, 6144

Product = tuple[Tensor, Tensor]


def sum_of_products(products: Sequence[Product], scale: float = 1.0, into: Tensor | None = None) -> Tensor:
    """scale · Σ x w, or that added to what is there.

    Args:
        products: of x (rows, inner) and w (inner, columns), all of one dtype.
        into: (rows, columns), what the sum is added to and where it goes; a new tensor unless told.
    """
    for some in _sums(products):
        found = sum_in_tiles(some, scale, into)
        into = _sum_by_torch(some, scale, into) if found is None else found
    assert into is not None, "a sum has a product at least"
    return into


def _sums(products: Sequence[Product]) -> list[list[Product]]:
    """The products in as few sums as are short enough for tiles, in their order."""
    sums: list[list[Product]] = []
    terms = 0
    for product in products:
        terms += product[0].shape[1]
        if terms > LONGEST or not sums:
            sums.append([])
            terms = product[0].shape[1]
        sums[-1].append(product)
    return sums


def _sum_by_torch(products: Sequence[Product], scale: float, into: Tensor | None) -> Tensor:
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
    kernels = _kernels_of(products, into)
    if kernels is None:
        return None
    rows, columns = products[0][0].shape[0], products[0][1].shape[1]
    if any(x.shape != (rows, w.shape[0]) or w.shape[1] != columns for x, w in products):
        return None  # torch says what does not fit
    if into is not None and (into.shape != (rows, columns) or into.stride(0) < columns):
        return None
    found: Tensor = kernels.sum_of_products(products, scale, into)
    return found


def product_over_rows(u: Tensor, v: Tensor) -> Tensor:
    """uᵀ v of (rows, m) and (rows, n): (m, n), in fp32 where nothing was rounded on the way."""
    kernels = _tiles([u, v], [])
    if kernels is not None and u.shape[0] == v.shape[0]:
        found: Tensor = kernels.product_over_rows(u, v)
        return found
    return torch.mm(u.T, v)


def has_tiles(products: Sequence[Product]) -> bool:
    """Whether their sum is computed in tiles; not where autograd would have to know of it."""
    return _kernels_of(products) is not None


def _kernels_of(products: Sequence[Product], into: Tensor | None = None) -> ModuleType | None:
    by_row = [x for x, _ in products]
    kernels = _tiles(by_row if into is None else [*by_row, into], [w for _, w in products])
    return kernels if kernels is not None and sum(x.shape[1] for x in by_row) <= LONGEST else None


def tiles_for(x: Tensor) -> ModuleType | None:
    """The kernels, if they have tiles for products of x, (rows, inner)."""
    kernels = kernels_for(x) if x.dtype == torch.bfloat16 and x.shape[0] >= _FEWEST else None
    return kernels if kernels is not None and kernels.in_tiles(torch.bfloat16) else None


def lies(t: Tensor, along: int) -> bool:
    """Whether it is bf16 where it seems to be, one element beside the other along a dimension."""
    return has_plain_memory(t) and t.dtype == torch.bfloat16 and t.is_cpu and t.stride(along) == 1 and bool(t.numel())


def _tiles(by_row: Sequence[Tensor], either: Sequence[Tensor]) -> ModuleType | None:
    """The kernels, if they have products of these in tiles: matrices whose rows are contiguous, and rows or columns."""
    kernels = tiles_for(by_row[0])
    if kernels is None:
        return None
    with_gradients = torch.is_grad_enabled()
    for tensors, turned in ((by_row, False), (either, True)):
        for t in tensors:
            if not lies(t, 1) and not (turned and lies(t, 0)):
                return None
            if with_gradients and t.requires_grad:
                return None
    return kernels
