"""Attention over a tree of segments as plain matrix products, for training on a CPU.

Nodes stand depth first, so that a node's descendants follow it directly: the queries of a node and of all below it meet
the node's keys in one product, whatever the number of branches. A long node is cut into a chain of short ones, which
leaves out what causality forbids. Partial results of a path are merged as in Milakov and Gimelshein, "Online normalizer
calculation for softmax" (arXiv:1805.02867); the backward pass computes the probabilities again (Dao et al.,
FlashAttention, arXiv:2205.14135, algorithm 4), so that nothing quadratic is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Keys of one product: shorter ones compute less of what causality forbids, longer ones make better products.
_KEYS = 256
# Queries of one product, at least as many as keys; bounds the memory of the scores.
_ROWS = 1024


class Block(NamedTuple):
    """Queries `rows` meet keys `keys`, both ranges of tokens.

    Attributes:
        own: how many of the first queries are the keys' own tokens, under a causal mask.
        first: whether these queries have met no keys before.
        mask: (queries, keys), True where a window forbids, or None.
    """

    rows: slice
    keys: slice
    own: int
    first: bool
    mask: Tensor | None


@lru_cache(maxsize=64)
def blocks_of(
    segments: tuple[int, ...], above: tuple[tuple[int, ...], ...] | None, window: int | None
) -> tuple[Block, ...] | None:
    """The products of one attention call, ancestors first; None where a segment's descendants do not follow it."""
    above = above or ((),) * len(segments)
    starts = [0]
    for length in segments:
        starts.append(starts[-1] + length)
    ends = [_end(above, i) for i in range(len(segments))]
    if any(i in path for i, end in enumerate(ends) for path in above[end:]):
        return None
    depth = [sum(segments[a] for a in path) for path in above]
    positions = torch.cat([torch.arange(d, d + n) for d, n in zip(depth, segments, strict=True)])
    blocks: list[Block] = []
    for i, (length, end) in enumerate(zip(segments, ends, strict=True)):
        for begin in range(0, length, _KEYS):
            keys = slice(starts[i] + begin, starts[i] + min(begin + _KEYS, length))
            blocks += _blocks(keys, starts[end], not above[i] and begin == 0, window, positions)
    return tuple(blocks)


def _end(above: Sequence[tuple[int, ...]], node: int) -> int:
    """The first segment after `node` that does not stand below it."""
    end = node + 1
    while end < len(above) and node in above[end]:
        end += 1
    return end


def _blocks(keys: slice, stop: int, first: bool, window: int | None, positions: Tensor) -> list[Block]:
    """The products of some keys with all queries up to `stop`."""
    blocks = []
    for begin in range(keys.start, stop, _ROWS):
        rows = slice(begin, min(begin + _ROWS, stop))
        own = max(0, keys.stop - begin)
        mask = None
        if window is not None:
            far = positions[rows, None] - positions[None, keys] >= window
            if far.all() and not first:
                continue
            mask = far if far.any() else None
        blocks.append(Block(rows, keys, own, first, mask))
    return blocks


def tree_attention(query: Tensor, key: Tensor, value: Tensor, blocks: tuple[Block, ...], scale: float | None) -> Tensor:
    """softmax(s · Q Kᵀ + mask) V over the paths that `blocks` were made of.

    Args:
        query: (heads, tokens, dim); key and value: (kv heads, tokens, dim), each kv head for heads // kv heads in turn.
        scale: s; 1 / √dim when None.

    Returns:
        (tokens, heads, value's dim).
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    # Token by token, with the heads that share a key head beside each other: a range of tokens is then one matrix.
    groups = query.shape[0] // key.shape[0]
    grouped = query.unflatten(0, (key.shape[0], groups)).transpose(1, 2)
    output: Tensor = _TreeAttention.apply(grouped, key, value, blocks, scale)  # type: ignore[no-untyped-call]
    return output.flatten(1, 2)


class _TreeAttention(torch.autograd.Function):
    """Of (kv heads, tokens, groups, dim) queries; gives (tokens, kv heads, groups, dim)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: tuple[Block, ...], scale: float) -> Tensor:
        # The copy that sorts the heads scales as well: once here instead of with every product.
        query, key, value = (query * scale).contiguous(), key.contiguous(), value.contiguous()
        output, largest, total = _forward(query, key, value, blocks)
        ctx.save_for_backward(query, key, value, output, largest, total)
        ctx.blocks, ctx.scale = blocks, scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, largest, total = ctx.saved_tensors
        weighted = (grad / total.permute(1, 0, 2)[..., None]).to(grad.dtype)
        inner = (grad * output).sum(-1, dtype=total.dtype) / total.permute(1, 0, 2)
        weighted, inner = weighted.transpose(0, 1).contiguous(), inner.transpose(0, 1).contiguous()
        gq, gk, gv = _backward(query, key, value, weighted, inner, largest, ctx.blocks)
        return gq.mul_(ctx.scale).to(grad.dtype), gk.to(grad.dtype), gv.to(grad.dtype), None, None


def _forward(query: Tensor, key: Tensor, value: Tensor, blocks: tuple[Block, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and of each query the largest score (in the query's dtype) and the sum of exp(score - largest)."""
    heads, tokens, groups, _ = query.shape
    dim = value.shape[-1]
    wide = torch.promote_types(query.dtype, torch.float32)
    largest = query.new_empty(heads, tokens, groups)
    total = query.new_empty(heads, tokens, groups, dtype=wide)
    once = all(block.first for block in blocks)
    sums = query.new_empty(heads, tokens, groups, dim, dtype=query.dtype if once else wide)
    for block in blocks:
        scores = torch.bmm(query[:, block.rows].flatten(1, 2), key[:, block.keys].mT)
        _forbid(scores, block, groups, lower=True)
        top = scores.amax(-1)
        weights = scores.sub_(top[..., None]).exp_()
        here = weights.sum(-1, dtype=wide).unflatten(1, (-1, groups))
        part = torch.bmm(weights, value[:, block.keys]).unflatten(1, (-1, groups))
        top, at = top.unflatten(1, (-1, groups)), (slice(None), block.rows)
        if block.first:
            largest[at], total[at], sums[at] = top, here, part
            continue
        most = torch.maximum(largest[at], top)
        old, new = (largest[at] - most).to(wide).exp_(), (top - most).to(wide).exp_()
        total[at] = total[at] * old + here * new
        sums[at] = sums[at].mul_(old[..., None]).addcmul_(part.to(wide), new[..., None])
        largest[at] = most
    output = query.new_empty(tokens, heads, groups, dim)
    torch.div(sums, total[..., None], out=output.transpose(0, 1))
    return output, largest, total


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    inner: Tensor,
    largest: Tensor,
    blocks: tuple[Block, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the scaled query, of key and of value, in fp32 at least.

    Args:
        grad: the output's, with 1 / total in it. inner: its product with the output.
    """
    groups = query.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    gq, gk, gv = (torch.zeros_like(tensor, dtype=wide) for tensor in (query, key, value))
    for block in blocks:
        q, g = query[:, block.rows].flatten(1, 2), grad[:, block.rows].flatten(1, 2)
        k, v = key[:, block.keys], value[:, block.keys]
        top = largest[:, block.rows].flatten(1, 2)[..., None]
        # Rounded as in the forward pass, or these weights would not add up to the total of those.
        weights = torch.bmm(q, k.mT).sub_(top).exp_()
        _forbid(weights, block, groups, lower=False)
        gv[:, block.keys] += torch.bmm(weights.mT, g)
        # In two parts, because what is rounded here is wrong for a whole row alike.
        mean = inner[:, block.rows].flatten(1, 2)[..., None]
        coarse = mean.to(g.dtype)
        ds = torch.baddbmm(coarse, g, v.mT, beta=-1).sub_((mean - coarse).to(g.dtype)).mul_(weights)
        gq[:, block.rows] += torch.bmm(ds, k).unflatten(1, (-1, groups))
        gk[:, block.keys] += torch.bmm(ds.mT, q)
    return gq, gk, gv


def _forbid(scores: Tensor, block: Block, groups: int, *, lower: bool) -> None:
    """What a query must not see gets a score that counts as nothing, or else (of weights) zero.

    `scores` are (heads, queries · groups, keys). By arithmetic, because filling by a mask runs scalar on a CPU.
    """
    by_query = scores.unflatten(1, (-1, groups))
    if block.own:
        allowed = _allowed(block.own, scores.shape[-1], scores.dtype, scores.device, lower)[None, :, None]
        own = by_query[:, : block.own]
        own.add_(allowed) if lower else own.mul_(allowed)
    if block.mask is not None:
        by_query.masked_fill_(block.mask.to(scores.device)[None, :, None], _nothing(scores.dtype) if lower else 0.0)


@lru_cache(maxsize=64)
def _allowed(own: int, keys: int, dtype: torch.dtype, device: torch.device, lower: bool) -> Tensor:
    """(own, keys): 1 where a key is not later than a query, else 0; as what is added to a score, 0 and a low number."""
    seen = torch.ones(own, keys, dtype=dtype, device=device).tril_(keys - own)
    return (1 - seen) * _nothing(dtype) if lower else seen


def _nothing(dtype: torch.dtype) -> float:
    # Finite, so that a query which sees none of some keys has no NaN there; what it sees elsewhere outweighs it.
    return torch.finfo(dtype).min / 2
