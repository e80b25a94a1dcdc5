"""Attention over a tree of segments as plain matrix products, for training on a CPU.

A segment is a lane: its tokens meet each other and all that comes before them on their path from the root. Lanes with
as many tokens before them (rows that start afresh, branches of one prefix) and similar lengths are computed side by
side, padded to the longest: few large products instead of many small ones. Pads come last, where causality hides them.
Their queries go tile by tile, which leaves out most of what causality forbids, and each row of scores stands there
whole, so that its softmax and the gradient of that are one operation each. The backward pass computes the probabilities
again (Dao et al., FlashAttention, arXiv:2205.14135, section 3.1), so that nothing quadratic is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loratune.kernels import Lane, Range, lanes_of

# What one more tile costs, in pairs of query and key, and what each of its keys adds to that. Measured.
_TILE, _KEY = 6_000, 10
# Pairs that are computed at once: what a processor's cache holds of their scores.
_PAIRS = 1 << 19
# With fewer queries in a tile products are poor; as many of each lane should fit.
_FEWEST_QUERIES, _QUERIES = 32, 128
# The processor's softmax is nearly twice as fast on rows of whole vectors; worth a few pads, of this share at most.
_VECTOR, _MOST_PADS = 32, 1 / 16


class Tile(NamedTuple):
    """Some queries of each lane, as many of each.

    Attributes:
        tokens: (lanes · queries,), the token in each place; in a pad some token of the lane.
        pads: the places without a token.
        seen: the keys of a lane that some query of the tile can see; the last of them are the queries' own.
    """

    queries: int
    tokens: Tensor
    pads: Tensor
    seen: Range


class Lanes(NamedTuple):
    """Lanes side by side, each of `queries` places, behind as many keys of their paths as `known` says.

    Attributes:
        number: how many.
        keys: (lanes · (known + queries),), the tokens of each lane's path and its own.
        own: of each lane its tokens, as a range.
        paths: of neighbouring lanes with one path: the first, the one after the last, and the path.
    """

    number: int
    queries: int
    known: int
    keys: Tensor
    own: tuple[Range, ...]
    paths: tuple[tuple[int, int, tuple[Range, ...]], ...]
    tiles: tuple[Tile, ...]


class Plan(NamedTuple):
    """All lanes of a forward pass.

    Attributes:
        places: (tokens,), where each token stands among the places of all lanes; None where they are in order.
    """

    batches: tuple[Lanes, ...]
    places: Tensor | None
    window: int | None


def pairs_at_once(device_type: str, tokens: int, longest: int) -> int:
    """How many pairs of query and key have scores at the same time, in rows of `longest` tokens that start afresh.

    None where one kernel does all.
    """
    if device_type != "cpu" or not tokens:
        return 0
    lanes = max(1, min(tokens // longest, _PAIRS // (min(longest, _QUERIES) * longest)))
    return max((stop - start) * lanes * stop for start, stop in pairwise(_cuts(lanes, longest, 0)))


# One plan serves all layers of a step, two where some have a window; those of long rows are large.
@lru_cache(maxsize=4)
def plan_of(segments: tuple[int, ...], above: tuple[tuple[int, ...], ...] | None, window: int | None) -> Plan:
    """How the attention of a packed row is computed, by the lengths of its segments and what stands above each."""
    batches = tuple(_side_by_side(batch, window) for batch in _batches(lanes_of(segments, above, window)))
    tiles = [tile for batch in batches for tile in batch.tiles]
    tokens = torch.cat([tile.tokens for tile in tiles])
    real = torch.ones(len(tokens), dtype=torch.bool)
    begin = 0
    for tile in tiles:
        real[begin + tile.pads] = False
        begin += len(tile.tokens)
    places = torch.empty(sum(segments), dtype=torch.int64)
    places[tokens[real]] = torch.arange(len(tokens))[real]
    return Plan(batches, None if torch.equal(places, torch.arange(len(tokens))) else places, window)


def _batches(lanes: Iterator[Lane]) -> Iterator[list[Lane]]:
    """Lanes with as many keys before their own and similar lengths; those of one path are neighbours."""
    for _, alike in groupby(sorted(lanes, key=lambda lane: (lane.known, -lane.length)), lambda lane: lane.known):
        batch: list[Lane] = []
        for lane in alike:
            if batch and not _joins(lane, batch):
                yield batch
                batch = []
            batch.append(lane)
        yield batch


def _joins(lane: Lane, batch: list[Lane]) -> bool:
    """Whether a lane costs less beside others than alone: its pads less than its tiles."""
    longest, known = batch[0].length, lane.known
    if (len(batch) + 1) * min(longest, _QUERIES) * (known + longest) > _PAIRS:
        return False
    return (longest - lane.length) * (known + longest) <= _TILE * (len(_cuts(1, lane.length, known)) - 1)


def _side_by_side(lanes: list[Lane], window: int | None) -> Lanes:
    lanes = sorted(lanes)
    known = lanes[0].known
    queries = _whole_vectors(max(lane.length for lane in lanes), known)
    own = torch.stack([torch.arange(lane.own[0], lane.own[0] + queries).clamp_(max=lane.own[1] - 1) for lane in lanes])
    before = torch.stack([torch.cat([torch.arange(0), *(torch.arange(*part) for part in lane.path)]) for lane in lanes])
    empty = torch.arange(queries) >= torch.tensor([[lane.length] for lane in lanes])
    tiles = []
    for start, stop in pairwise(_cuts(len(lanes), queries, known)):
        pads = empty[:, start:stop].flatten().nonzero()[:, 0]
        first = 0 if window is None else max(0, known + start - window + 1)
        tiles.append(Tile(stop - start, own[:, start:stop].flatten(), pads, (first, known + stop)))
    firsts = [i for i, lane in enumerate(lanes) if i == 0 or lane.path != lanes[i - 1].path]
    paths = tuple((i, j, lanes[i].path) for i, j in pairwise([*firsts, len(lanes)]))
    keys = torch.cat([before, own], 1).flatten()
    return Lanes(len(lanes), queries, known, keys, tuple(lane.own for lane in lanes), paths, tuple(tiles))


def _cuts(lanes: int, queries: int, known: int) -> list[int]:
    """Where the tiles begin, and where the last one ends.

    n tiles compute q (known + q/2 + q/2n) pairs for each lane, and cost n times what a tile does; the least is at
    n = q √(lanes / 2 cost). More where the scores of a tile would not fit.
    """
    cost = _TILE + _KEY * lanes * (known + queries / 2)
    best = round(queries * math.sqrt(lanes / (2 * cost)))
    needed = math.ceil(lanes * queries * (known + queries) / _PAIRS)
    number = min(queries, max(needed, min(best, queries // _FEWEST_QUERIES), 1))
    even = [queries * i // number for i in range(number + 1)]
    if number == needed or number > queries // _VECTOR:
        return even
    # Rows of scores that are whole vectors.
    return [0, *((known + cut + _VECTOR // 2) // _VECTOR * _VECTOR - known for cut in even[1:-1]), queries]


def _whole_vectors(queries: int, known: int) -> int:
    more = -(known + queries) % _VECTOR
    return queries + more if more <= _MOST_PADS * queries else queries


def tree_attention(query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float | None) -> Tensor:
    """softmax(s · Q Kᵀ + mask) V over the paths that `plan` was made of.

    Args:
        query: (heads, tokens, dim); key and value: (kv heads, tokens, dim), each kv head for heads // kv heads in turn.
        scale: s; 1 / √dim when None.

    Returns:
        (tokens, heads, value's dim).
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    # Token by token, with the heads that share a key head beside each other: a lane's queries are then one matrix.
    grouped = query.unflatten(0, (key.shape[0], query.shape[0] // key.shape[0])).transpose(1, 2)
    output: Tensor = _TreeAttention.apply(grouped, key, value, plan, scale)  # type: ignore[no-untyped-call]
    return output.flatten(1, 2)


class _TreeAttention(torch.autograd.Function):
    """Of (kv heads, tokens, groups, dim) queries; gives (tokens, kv heads, groups, dim)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float) -> Tensor:
        # The copy that sorts the heads scales as well: once here instead of with every product.
        scaled = torch.mul(query, scale, out=torch.empty(query.shape, dtype=query.dtype, device=query.device))
        key, value = key.contiguous(), value.contiguous()
        ctx.save_for_backward(scaled, key, value)
        ctx.plan, ctx.scale = plan, scale
        parts = []
        for lanes in plan.batches:
            keys, values = (_of_lanes(tensor, lanes, plan) for tensor in (key, value))
            for tile in lanes.tiles:
                q, k, v = _of_tile(scaled, tile, lanes, plan), _seen(keys, tile), _seen(values, tile)
                part = torch.bmm(_probabilities(q, k, tile, plan.window), v)
                parts.append(part.view(len(key), len(tile.tokens), -1))
        output = _by_token(parts, plan).view(*query.shape[:3], value.shape[-1])
        return output.transpose(0, 1).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        plan: Plan = ctx.plan
        grad = grad.transpose(0, 1).contiguous()
        wide = torch.promote_types(query.dtype, torch.float32)
        # Sums by token: what each tile gives its whole path would be quadratic in a long row.
        gk, gv = (torch.zeros_like(tensor, dtype=wide) for tensor in (key, value))
        queries = []
        for lanes in plan.batches:
            keys, values = (_of_lanes(tensor, lanes, plan) for tensor in (key, value))
            of_keys: Tensor | None = None
            of_values: Tensor | None = None
            for tile in lanes.tiles:
                q, k, v = _of_tile(query, tile, lanes, plan), _seen(keys, tile), _seen(values, tile)
                g = _of_tile(grad, tile, lanes, plan, without_pads=True)
                p = _probabilities(q, k, tile, plan.window)
                of_values = _added(of_values, torch.bmm(p.mT, g), tile, lanes)
                dp = torch.bmm(g, v.mT)
                ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
                queries.append(torch.bmm(ds, k).view(len(key), len(tile.tokens), -1))
                of_keys = _added(of_keys, torch.bmm(ds.mT, q), tile, lanes)
            assert of_keys is not None, "lanes have a tile at least"
            assert of_values is not None
            _add_by_token(gk, of_keys, lanes)
            _add_by_token(gv, of_values, lanes)
        gq = _by_token(queries, plan).mul_(ctx.scale).view(query.shape)
        return gq, gk.to(key.dtype), gv.to(value.dtype), None, None


def _of_lanes(tensor: Tensor, lanes: Lanes, plan: Plan) -> Tensor:
    """Keys or values (kv heads · lanes, keys, dim)."""
    return _picked(tensor, lanes.keys, plan).view(len(tensor) * lanes.number, -1, tensor.shape[-1])


def _seen(keys: Tensor, tile: Tile) -> Tensor:
    return keys[:, slice(*tile.seen)]


def _of_tile(tensor: Tensor, tile: Tile, lanes: Lanes, plan: Plan, *, without_pads: bool = False) -> Tensor:
    """Queries, or gradients of what they gave: (kv heads · lanes, queries · groups, dim), zero in pads if told."""
    found = _picked(tensor.flatten(2), tile.tokens, plan)
    if without_pads and len(tile.pads):  # a copy then: what has pads is never the tensor itself
        found.index_fill_(1, tile.pads, 0.0)
    return found.view(len(tensor) * lanes.number, -1, tensor.shape[-1])


def _picked(tensor: Tensor, tokens: Tensor, plan: Plan) -> Tensor:
    """(kv heads, tokens, features) at some tokens."""
    alone = plan.places is None and len(plan.batches) == 1 and len(tokens) == tensor.shape[1]
    return tensor if alone else tensor.index_select(1, tokens)


def _probabilities(q: Tensor, k: Tensor, tile: Tile, window: int | None) -> Tensor:
    """(batch, queries · groups, keys) of (batch, queries · groups, dim) and (batch, keys, dim); none of what is later.

    Rounded in the forward and the backward pass alike.
    """
    scores = torch.bmm(q, k.mT)
    groups, keys = scores.shape[1] // tile.queries, scores.shape[2]
    narrow = window is None or tile.seen[1] <= window
    # Without a window the mask is the same whatever comes before.
    before, reach = (0, None) if narrow else (keys - tile.queries, window)
    mask = _mask(tile.queries, before, reach, groups, scores.dtype)
    scores[..., keys - mask.shape[-1] :].add_(mask)
    return torch.softmax(scores, -1, out=scores)


@lru_cache(maxsize=16)
def _mask(queries: int, known: int, window: int | None, groups: int, dtype: torch.dtype) -> Tensor:
    """(queries · groups, known + queries): 0 where a key may be seen, else a low number."""
    age = torch.arange(known, known + queries)[:, None] - torch.arange(known + queries)
    hidden = age < 0 if window is None else (age < 0) | (age >= window)
    # Finite, and of half the range: scores are added to it.
    return (hidden.to(dtype) * (torch.finfo(dtype).min / 2)).repeat_interleave(groups, 0)


def _by_token(parts: Sequence[Tensor], plan: Plan) -> Tensor:
    """(kv heads, tokens, features) from those in the places of all tiles."""
    joined = parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
    return joined if plan.places is None else joined.index_select(1, plan.places)


def _added(total: Tensor | None, part: Tensor, tile: Tile, lanes: Lanes) -> Tensor:
    """What the tiles of some lanes give their keys, up to this one: (kv heads · lanes, keys, dim)."""
    if len(lanes.tiles) == 1:
        return part
    if total is None:
        wide = torch.promote_types(part.dtype, torch.float32)
        total = torch.zeros(len(part), lanes.known + lanes.queries, part.shape[-1], dtype=wide, device=part.device)
    _seen(total, tile).add_(part)
    return total


def _add_by_token(total: Tensor, part: Tensor, lanes: Lanes) -> None:
    """Add what some lanes give their keys (kv heads · lanes, keys, dim) to the sum by token (kv heads, tokens, dim)."""
    apart = part.view(len(total), lanes.number, lanes.known + lanes.queries, -1)
    for i, (start, stop) in enumerate(lanes.own):
        total[:, start:stop] += apart[:, i, lanes.known : lanes.known + stop - start]
    for first, last, path in lanes.paths:
        above = apart[:, first] if last - first == 1 else apart[:, first:last, : lanes.known].sum(1, dtype=total.dtype)
        begin = 0
        for start, stop in path:
            total[:, start:stop] += above[:, begin : begin + stop - start]
            begin += stop - start
