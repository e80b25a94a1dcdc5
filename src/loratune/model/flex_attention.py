"""Attention over a tree of segments in one kernel, for CUDA: torch's FlexAttention with a mask of blocks.

Segments stand depth first, so that a key is seen by an interval of queries: from itself to the end of what stands below
its segment. Two numbers a token say everything, and which blocks of 128 × 128 have something to compute follows from
their least and largest, so that no (tokens × tokens) mask is ever made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from loratune.model.kernels import triton_for

_BLOCK = 128
# What torch's kernel takes; narrower heads than these have no tile.
_LEAST_DIM = 16
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Above = tuple[tuple[int, ...], ...]


class Sight(NamedTuple):
    """What each token can be seen by.

    Attributes:
        last: (tokens,), the first token behind all that stands below the token's segment.
        position: (tokens,), its depth in its path.
    """

    last: Tensor
    position: Tensor


def sight_of(segments: tuple[int, ...], above: Above | None) -> Sight | None:
    """None where what stands below a segment does not follow it."""
    above = above or ((),) * len(segments)
    starts = [0]
    for length in segments:
        starts.append(starts[-1] + length)
    last, position = [], []
    for i, length in enumerate(segments):
        end = i + 1
        while end < len(above) and i in above[end]:
            end += 1
        if any(i in path for path in above[end:]):
            return None
        depth = sum(segments[a] for a in above[i])
        last.append(torch.full((length,), starts[end]))
        position.append(torch.arange(depth, depth + length))
    return Sight(torch.cat(last), torch.cat(position))


@lru_cache(maxsize=16)
def block_mask_of(
    segments: tuple[int, ...], above: Above | None, window: int | None, device: torch.device, size: int = _BLOCK
) -> BlockMask | None:
    """Which blocks of queries and keys are computed whole, in part, or not at all; None as in `sight_of`."""
    sight = sight_of(segments, above)
    if sight is None:
        return None
    tokens = sum(segments)
    some, every = _blocks(sight, window, size)
    partial = some & ~every
    last, position = (t.to(device=device, dtype=torch.int32) for t in sight)

    def seen(_: Tensor, __: Tensor, i: Tensor, j: Tensor) -> Tensor:
        found = (j <= i) & (i < last[j])
        return found if window is None else found & (position[i] - position[j] < window)

    mask: BlockMask = BlockMask.from_kv_blocks(
        *_listed(partial, device), *_listed(every, device), size, mask_mod=seen, seq_lengths=(tokens, tokens)
    )
    return mask


def _blocks(sight: Sight, window: int | None, size: int) -> tuple[Tensor, Tensor]:
    """(query blocks, key blocks): where some pair may be seen, and where every pair is."""
    tokens = len(sight.last)
    first = torch.arange(0, tokens, size)
    final = (first + size - 1).clamp(max=tokens - 1)
    more = -tokens % size
    lasts, positions = (F.pad(t[None].float(), (0, more), mode="replicate")[0].long().view(-1, size) for t in sight)
    some = (first <= final[:, None]) & (lasts.amax(1) > first[:, None])
    every = (final <= first[:, None]) & (lasts.amin(1) > final[:, None])
    if window is not None:
        some &= positions.amin(1)[:, None] - positions.amax(1) < window
        every &= positions.amax(1)[:, None] - positions.amin(1) < window
    return some, every


def _listed(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each block of queries how many blocks of keys, and these first in a list of all."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return tuple(t.to(device=device, dtype=torch.int32)[None, None] for t in (blocks.sum(1), order))  # type: ignore[return-value]


def can_flex(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether the kernel takes these."""
    wide = min(query.shape[-1], value.shape[-1]) >= _LEAST_DIM
    same = query.dtype == value.dtype and query.dtype in _DTYPES
    return query.is_cuda and dropout == 0.0 and wide and same and triton_for(query) is not None


@cache
def _compiled() -> Callable[..., Any]:
    # One for all lengths: a step's rows are packed to another one each time.
    return torch.compile(flex_attention, dynamic=True)


def flex_tree_attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    """softmax(s · Q Kᵀ + mask) V.

    Args:
        query: (1, heads, tokens, dim); key and value: (1, kv heads, tokens, dim).
        scale: s; 1 / √dim when None.

    Returns:
        (1, tokens, heads, value's dim).
    """
    # Without a compiler the same formula is computed by plain operations: what tests on a CPU see.
    attend = _compiled() if query.is_cuda else cast(Callable[..., Any], flex_attention)
    grouped = query.shape[1] != key.shape[1]
    # Of several kernels the one for training: fewer are compiled, and past torch's limit all pairs would be formed.
    options = {"FORCE_USE_FLEX_ATTENTION": True} if query.is_cuda else None
    output: Tensor = attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped, kernel_options=options)
    return output.transpose(1, 2)
