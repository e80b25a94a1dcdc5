"""The equation of low-rank adaptation, and its gradients, each way in one call of a kernel (`c_low_rank.c`)."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from loratune.kernels.adapted import Adapted
from loratune.kernels.chosen import has_plain_memory
from loratune.kernels.products import LONGEST, lies, tiles_for

_MASTERS = (torch.float32, torch.bfloat16)


def adapted_in_tiles(x: Tensor, projections: Sequence[Adapted]) -> tuple[list[Tensor], Tensor] | None:
    """What each gives for x, and s · A x of all beside each other, (rows, Σ r); None where no kernel computes them.

    The bits are those of `sum_of_products`, call after call.

    Args:
        x: (rows, in_features).
    """
    kernels = _kernels_of(x, projections)
    if kernels is None or x.shape[1] + 1 + max(len(p.A) for p in projections) > LONGEST:
        return None
    found: tuple[list[Tensor], Tensor] = kernels.low_rank_forward(x, projections)
    return found


def gradients_in_tiles(
    x: Tensor,
    h: Tensor,
    grads: Sequence[Tensor],
    projections: Sequence[Adapted],
    wanted: Sequence[tuple[bool, bool]],
    *,
    wants_x: bool,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]] | None:
    """The gradients of x, the As and the Bs, those in fp32, or None where no kernel computes them.

    The bits are those of `sum_of_products` and `product_over_rows`, call after call.

    Args:
        h: s · A x of all, (rows, Σ r). grads: of what each gives, (rows, out_features).
        wanted: whether the gradient of each A, and of each B, is.
    """
    kernels = _kernels_of(x, projections)
    if kernels is None or sum(len(p.B) + len(p.A) for p in projections) > LONGEST:
        return None
    if not lies(h, 1) or not h.is_contiguous() or h.shape != (len(x), sum(len(p.A) for p in projections)):
        return None
    for gy, p in zip(grads, projections, strict=True):
        if not lies(gy, 1) or gy.shape != (len(x), len(p.B)):
            return None
    found: tuple[Tensor | None, list[Tensor | None], list[Tensor | None]] = kernels.low_rank_backward(
        x, h, grads, projections, wanted, wants_x=wants_x
    )
    return found


def _kernels_of(x: Tensor, projections: Sequence[Adapted]) -> ModuleType | None:
    """The kernels, where they take these; of shapes that do not fit torch says so."""
    kernels = tiles_for(x)
    if kernels is None or not projections or not lies(x, 1):
        return None
    for weight, A, B, _, bias in projections:
        (r, inner), (out, also_r) = A.shape, B.shape
        if x.shape[1] != inner or also_r != r or weight.shape != (out, inner):
            return None
        if not lies(weight, 1) and not lies(weight, 0):
            return None
        if not (A.dtype in _MASTERS and B.dtype in _MASTERS and has_plain_memory(A) and has_plain_memory(B)):
            return None
        if not (A.is_contiguous() and B.is_contiguous() and A.numel() and B.numel() and A.is_cpu and B.is_cpu):
            return None
        if bias is not None and (not lies(bias, 0) or bias.shape != (out,)):
            return None
    return kernels
