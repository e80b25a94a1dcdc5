"""Attention over a tree of segments as plain matrix products, for training on a CPU.

Queries stand in lanes: some tokens of one segment, which meet each other and all that comes before them on their path
from the root. Lanes with as many tokens before them (rows that start afresh, branches of one prefix, later parts of
long rows) are computed side by side, padded to the longest: few large products instead of many small ones, and each
row of scores stands there whole, so that its softmax and the gradient of that are one operation each. Pads come last,
where causality hides them. Long segments are cut into lanes, which leaves out most of what causality forbids. The
backward pass computes the probabilities again (Dao et al., FlashAttention, arXiv:2205.14135, section 3.1), so that
nothing quadratic is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Queries of a lane, about: with fewer, less is computed of what causality forbids, with more, products are better.
_QUERIES = 192
# Pairs of query and key that are computed at once: what a processor's cache holds of their scores. Lanes that meet many
# keys are shorter, down to a length that makes poor products.
_PAIRS, _FEWEST_QUERIES = 1 << 19, 32
# A lane shorter than this share of the longest beside it goes elsewhere: pads cost as much as tokens.
_LEAST_FULL = 0.75
# The processor's softmax is nearly twice as fast on rows of whole vectors; worth a few pads, of this share at most.
_VECTOR, _MOST_PADS = 32, 1 / 16

Range = tuple[int, int]


class Lane(NamedTuple):
    """Tokens `own`, after the tokens of `path` (ranges in order) that its queries can see."""

    path: tuple[Range, ...]
    own: Range

    @property
    def length(self) -> int:
        return self.own[1] - self.own[0]

    @property
    def known(self) -> int:
        return sum(stop - start for start, stop in self.path)


class Lanes(NamedTuple):
    """Lanes side by side, each of `queries` places, behind as many keys of their paths as `known` says.

    Attributes:
        number: how many.
        tokens: (lanes · queries,), the token in each place; in a pad some token of the lane.
        pads: the places without a token.
        keys: (lanes · (known + queries),), those tokens behind those of the lane's path.
        own: of each lane its tokens, as a range.
        paths: of neighbouring lanes with one path: the first, the one after the last, and the path.
    """

    number: int
    queries: int
    known: int
    tokens: Tensor
    pads: Tensor
    keys: Tensor
    own: tuple[Range, ...]
    paths: tuple[tuple[int, int, tuple[Range, ...]], ...]


class Plan(NamedTuple):
    """All lanes of a forward pass.

    Attributes:
        places: (tokens,), where each token stands among the places of all lanes; None where they are in order.
    """

    batches: tuple[Lanes, ...]
    places: Tensor | None
    window: int | None


def pairs_at_once(device_type: str) -> int:
    """How many pairs of query and key have scores at the same time; none where one kernel does all."""
    return _PAIRS if device_type == "cpu" else 0


# One plan serves all layers of a step, two where some have a window; those of long rows are large.
@lru_cache(maxsize=4)
def plan_of(segments: tuple[int, ...], above: tuple[tuple[int, ...], ...] | None, window: int | None) -> Plan:
    """How the attention of a packed row is computed, by the lengths of its segments and what stands above each."""
    lanes = _lanes(segments, above or ((),) * len(segments), window)
    batches = tuple(_side_by_side(batch) for batch in _batches(lanes))
    tokens = torch.cat([batch.tokens for batch in batches])
    real = torch.ones(len(tokens), dtype=torch.bool)
    begin = 0
    for batch in batches:
        real[begin + batch.pads] = False
        begin += len(batch.tokens)
    places = torch.empty(sum(segments), dtype=torch.int64)
    places[tokens[real]] = torch.arange(len(tokens))[real]
    return Plan(batches, None if torch.equal(places, torch.arange(len(tokens))) else places, window)


def _lanes(segments: Sequence[int], above: Sequence[tuple[int, ...]], window: int | None) -> Iterator[Lane]:
    starts = [0]
    for length in segments:
        starts.append(starts[-1] + length)
    for start, stop, path in zip(starts[:-1], starts[1:], above, strict=True):
        before = [(starts[a], starts[a + 1]) for a in path]
        whole = sum(end - begin for begin, end in before) + stop - start
        most = max(1, whole if window is None else min(whole, window + _QUERIES))
        parts = max(1, round((stop - start) / min(_QUERIES, max(_FEWEST_QUERIES, _PAIRS // most))))
        cuts = [start + (stop - start) * i // parts for i in range(parts + 1)]
        for begin, end in pairwise(cuts):
            yield Lane(_in_sight([*before, (start, begin)], window), (begin, end))


def _in_sight(path: Sequence[Range], window: int | None) -> tuple[Range, ...]:
    """The last tokens of a path, as far as the window of the next one reaches back; adjoining ranges are one."""
    room = math.inf if window is None else window - 1
    found: list[Range] = []
    for start, stop in reversed(path):
        begin = int(max(start, stop - room))
        if begin < stop:
            if found and found[-1][0] == stop:
                found[-1] = (begin, found[-1][1])
            else:
                found.append((begin, stop))
            room -= stop - begin
    return tuple(reversed(found))


def _batches(lanes: Iterator[Lane]) -> Iterator[list[Lane]]:
    """Lanes with as many keys before their own and similar lengths; those of one path are neighbours."""
    for known, alike in groupby(sorted(lanes, key=lambda lane: (lane.known, -lane.length)), lambda lane: lane.known):
        batch: list[Lane] = []
        for lane in alike:
            longest = batch[0].length if batch else lane.length
            pairs = (len(batch) + 1) * longest * (known + longest)
            if batch and (pairs > _PAIRS or lane.length < _LEAST_FULL * longest):
                yield batch
                batch = []
            batch.append(lane)
        yield batch


def _side_by_side(lanes: list[Lane]) -> Lanes:
    lanes = sorted(lanes)
    known = lanes[0].known
    queries = _whole_vectors(max(lane.length for lane in lanes), known)
    own = torch.stack([torch.arange(lane.own[0], lane.own[0] + queries).clamp_(max=lane.own[1] - 1) for lane in lanes])
    before = torch.stack([torch.cat([torch.arange(0), *(torch.arange(*part) for part in lane.path)]) for lane in lanes])
    empty = torch.arange(queries) >= torch.tensor([[lane.length] for lane in lanes])
    firsts = [i for i, lane in enumerate(lanes) if i == 0 or lane.path != lanes[i - 1].path]
    paths = tuple((i, j, lanes[i].path) for i, j in pairwise([*firsts, len(lanes)]))
    pads = empty.flatten().nonzero()[:, 0]
    ranges = tuple(lane.own for lane in lanes)
    keys = torch.cat([before, own], 1).flatten()
    return Lanes(len(lanes), queries, known, own.flatten(), pads, keys, ranges, paths)


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
            q, k, v = _met(scaled, key, value, lanes, plan)
            part = torch.bmm(_probabilities(q, k, lanes, plan.window), v)
            parts.append(part.view(len(key), len(lanes.tokens), -1))
        output = _by_token(parts, plan).view(*query.shape[:3], value.shape[-1])
        return output.transpose(0, 1).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        plan: Plan = ctx.plan
        grad = grad.transpose(0, 1).contiguous()
        wide = torch.promote_types(query.dtype, torch.float32)
        # One sum by token: what each lane gives its whole path would be quadratic in a long row.
        gk, gv = (torch.zeros_like(tensor, dtype=wide) for tensor in (key, value))
        queries = []
        for lanes in plan.batches:
            q, k, v = _met(query, key, value, lanes, plan)
            g = _picked(grad, lanes.tokens, plan)
            if len(lanes.pads):
                g.index_fill_(1, lanes.pads, 0.0)
            g = g.view(len(q), -1, grad.shape[-1])
            p = _probabilities(q, k, lanes, plan.window)
            _add_by_key(gv, torch.bmm(p.mT, g), lanes)
            dp = torch.bmm(g, v.mT)
            ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
            queries.append(torch.bmm(ds, k).view(len(key), len(lanes.tokens), -1))
            _add_by_key(gk, torch.bmm(ds.mT, q), lanes)
        gq = _by_token(queries, plan).mul_(ctx.scale).view(query.shape)
        return gq, gk.to(key.dtype), gv.to(value.dtype), None, None


def _met(query: Tensor, key: Tensor, value: Tensor, lanes: Lanes, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of some lanes: (kv heads · lanes, places or places · groups, dim)."""
    found = (_picked(query, lanes.tokens, plan), _picked(key, lanes.keys, plan), _picked(value, lanes.keys, plan))
    q, k, v = (x.view(len(x) * lanes.number, -1, t.shape[-1]) for x, t in zip(found, (query, key, value), strict=True))
    return q, k, v


def _picked(tensor: Tensor, tokens: Tensor, plan: Plan) -> Tensor:
    """(kv heads, tokens, ..., dim) at some tokens, the heads of one key head as one feature."""
    flat = tensor.flatten(2) if tensor.ndim > 3 else tensor
    return flat if plan.places is None and len(plan.batches) == 1 else flat.index_select(1, tokens)


def _probabilities(q: Tensor, k: Tensor, lanes: Lanes, window: int | None) -> Tensor:
    """(batch, queries · groups, keys) of (batch, queries · groups, dim) and (batch, keys, dim); none of what is later.

    Rounded in the forward and the backward pass alike.
    """
    scores = torch.bmm(q, k.mT)
    groups = scores.shape[1] // lanes.queries
    if window is None or lanes.known + lanes.queries <= window:
        mask = _mask(lanes.queries, 0, None, groups, scores.dtype)  # the same whatever comes before
    else:
        mask = _mask(lanes.queries, lanes.known, window, groups, scores.dtype)
    scores[..., scores.shape[-1] - mask.shape[-1] :].add_(mask)
    return torch.softmax(scores, -1, out=scores)


@lru_cache(maxsize=16)
def _mask(queries: int, known: int, window: int | None, groups: int, dtype: torch.dtype) -> Tensor:
    """(queries · groups, known + queries): 0 where a key may be seen, else a low number."""
    age = torch.arange(known, known + queries)[:, None] - torch.arange(known + queries)
    hidden = age < 0 if window is None else (age < 0) | (age >= window)
    # Finite, and of half the range: scores are added to it.
    return (hidden.to(dtype) * (torch.finfo(dtype).min / 2)).repeat_interleave(groups, 0)


def _by_token(parts: Sequence[Tensor], plan: Plan) -> Tensor:
    """(kv heads, tokens, features) from those in the places of all lanes."""
    joined = parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
    return joined if plan.places is None else joined.index_select(1, plan.places)


def _add_by_key(total: Tensor, part: Tensor, lanes: Lanes) -> None:
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
