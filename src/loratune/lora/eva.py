"""EVA: A from the directions in which a layer's inputs vary most, and ranks by how much they explain.

Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation"
(arXiv:2410.07170), section 3.2 and algorithm 1. Inputs count as they are, without their mean taken off: A multiplies
them so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

# Vectors that are taken in at once, where no more are kept.
_AT_ONCE = 64
# Below this share of the longest a direction is a rounding error of the squares that it comes from.
_NEGLIGIBLE = 1e-7


@dataclass(frozen=True)
class Directions:
    """Of the vectors that a layer has seen.

    Attributes:
        rows: (n, features), orthonormal, those that explain most first.
        explained: (n,), the share of the vectors' summed squared lengths along each.
    """

    rows: Tensor
    explained: Tensor


class Seen:
    """The leading directions of all vectors so far, without keeping them.

    An incremental singular value decomposition cut off after each step (Ross et al., "Incremental learning for robust
    visual tracking", 2008, without the mean): exact while the vectors span no more than `width` dimensions.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._kept: Tensor | None = None  # (n, features): singular values times directions, in fp64
        self._energy = 0.0

    def add(self, vectors: Tensor) -> None:
        """Take in `vectors` (n, features)."""
        for part in vectors.detach().split(max(self.width, _AT_ONCE)) if len(vectors) else ():
            # fp64 is not on every device.
            new = (part.cpu() if part.device.type == "mps" else part).double()
            self._energy += float(new.square().sum())
            self._kept = _leading(new if self._kept is None else torch.cat([self._kept, new]), self.width)

    def directions(self) -> Directions:
        """The leading ones in fp32; fewer than `width` where less was seen."""
        if self._kept is None or not len(self._kept):
            return Directions(torch.empty(0, 0), torch.empty(0))
        lengths = self._kept.norm(dim=1)
        there = lengths > _NEGLIGIBLE * lengths.max()
        rows, lengths = self._kept[there], lengths[there]
        return Directions((rows / lengths[:, None]).float(), (lengths.square() / (self._energy or 1.0)).cpu())


def _leading(rows: Tensor, width: int) -> Tensor:
    """The first `width` rows of S Vᵀ, where `rows` = U S Vᵀ: from the smaller of its two products with itself."""
    if len(rows) <= rows.shape[1]:
        _, U = torch.linalg.eigh(rows @ rows.T)
        return cast(Tensor, U.T.flip(0)[:width] @ rows)
    squares, V = torch.linalg.eigh(rows.T @ rows)
    return cast(Tensor, squares.flip(0)[:width, None].clamp_min(0).sqrt() * V.T.flip(0)[:width])


def ranks_by_explained(ranks: Mapping[str, int], explained: Mapping[str, Tensor], most: float) -> dict[str, int]:
    """Another rank for each layer: the directions of all layers that explain most, first.

    Their sum stays the same as far as there are directions.

    Args:
        ranks: before. most: how many times its own rank a layer may get.

    Returns:
        Ranks of at least 1: what is a target stays one.
    """
    limits = {path: min(int(most * r), len(explained[path])) for path, r in ranks.items()}
    found = dict.fromkeys(ranks, 1)
    wanted = [
        (-float(share), place, path)
        for path, shares in explained.items()
        for place, share in enumerate(shares[: limits[path]].tolist())
        if place > 0  # the first is given
    ]
    for _, _, path in sorted(wanted)[: sum(ranks.values()) - len(ranks)]:
        found[path] += 1
    return found


def eva_factors(directions: Directions, r: int, out_features: int) -> tuple[Tensor, Tensor]:
    """A (r, in): the leading r directions; B (out_features, r): zero. Both in fp32."""
    A = directions.rows[:r].clone()
    return A, A.new_zeros(out_features, r)
