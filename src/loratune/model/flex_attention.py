"""Attention over a tree of segments for CUDA: torch's flex attention, with the tree as a mask of blocks.

Segments stand depth first, so that all below one follow it directly: token i sees token j where j ≤ i < last(j), the
first token behind all that is below j's segment, and where a window reaches, position(i) < position(j) + window. Which
blocks of 128 × 128 pairs hold nothing, something or everything follows from the least and the greatest of these numbers
in each block; nothing has the size of tokens × tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import accumulate
from types import FunctionType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from loratune.kernels import deviation, furthest, triton_available

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_BLOCK = 128
# What torch's kernels multiply (tl.dot takes no less than 16, shared memory no more than 256, and no float64).
_DIMS = range(16, 257)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# As much as a leaking kernel is off by, and more than bf16 is.
_TOLERANCE = 5e-2
# One kernel for all lengths: below 128 tokens torch would take one that is made for decoding.
_OPTIONS = {"BACKEND": "TRITON"}

_log = logging.getLogger("loratune")


class _Kind(NamedTuple):
    """What is compiled for itself: heads of queries and of keys, dims of keys and of values, and so on."""

    device: torch.device
    dtype: torch.dtype
    heads: tuple[int, int]
    dims: tuple[int, int]
    scale: float | None
    windowed: bool


def takes(query: Tensor, key: Tensor, value: Tensor, scale: float | None, windowed: bool) -> bool:
    """Whether `flex_tree_attention` can compute these on their device, which is tried once for each kind of them."""
    dims, dtypes = (query.shape[-1], value.shape[-1]), {t.dtype for t in (query, key, value)}
    if len(dtypes) > 1 or query.dtype not in _DTYPES or any(dim not in _DIMS for dim in dims):
        return False
    if torch.compiler.is_compiling():
        return False
    kind = _Kind(query.device, query.dtype, (query.shape[1], key.shape[1]), dims, scale, windowed)
    return _works(kind)


def flex_tree_attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    """softmax(s · Q Kᵀ) V over what `mask` shows.

    Args:
        query: (1, heads, tokens, dim); key and value: (1, kv heads, tokens, dim), each kv head for heads // kv heads in
            turn.
        scale: s; 1 / √dim when None.

    Returns:
        (1, tokens, heads, value's dim).
    """
    if scale is not None and math.isclose(scale, query.shape[-1] ** -0.5, rel_tol=1e-9):
        scale = None
    eager = cast(Callable[..., Tensor], flex_attention)
    attend = _compiled(_variant_of(query, key, value, mask)) if query.is_cuda else eager
    grouped = query.shape[1] != key.shape[1]
    output = attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped, kernel_options=_OPTIONS)
    return output.transpose(1, 2)


class _Variant(NamedTuple):
    """What torch compiles a kernel of its own for, beside those of the backward pass."""

    dtypes: tuple[torch.dtype, ...]
    heads: tuple[int, ...]
    dims: tuple[int, ...]
    windowed: bool
    wanted: tuple[bool, ...]
    mode: tuple[bool, bool]


def _variant_of(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> _Variant:
    tensors = query, key, value
    return _Variant(
        tuple(t.dtype for t in tensors),
        tuple(t.shape[1] for t in tensors),
        tuple(t.shape[-1] for t in tensors),
        mask.mask_mod.__name__ == "visible_within",
        tuple(t.requires_grad for t in tensors),
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    )


@cache
def _compiled(variant: _Variant) -> Callable[..., Tensor]:  # noqa: ARG001 - a key
    """Flex attention compiled for this alone.

    Dynamo counts variants by code object and allows eight of each: each has a copy of its own. A full graph: past the
    limit a call must fail rather than compute all scores at once.
    """
    own = FunctionType(_attend.__code__.replace(), _attend.__globals__, _attend.__name__)
    return cast(Callable[..., Tensor], torch.compile(own, dynamic=True, fullgraph=True))


def _attend(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    return cast(Tensor, flex_attention(query, key, value, **how))


@lru_cache(maxsize=16)
def block_mask_of(
    segments: tuple[int, ...], above: tuple[tuple[int, ...], ...] | None, window: int | None, device: torch.device
) -> BlockMask | None:
    """What each block of tokens sees of each, by the lengths of the segments and what stands above each.

    Returns:
        None where a segment does not directly follow those above it or what else is below them.
    """
    if above is not None and not _is_depth_first(above):
        return None
    # Evaluation may come first: what is made in inference mode cannot be kept for a backward pass.
    with torch.inference_mode(False):
        last, position = _numbers(segments, above)
        return _block_mask(last.to(device), position.to(device), window)


def _is_depth_first(above: Sequence[tuple[int, ...]]) -> bool:
    path: tuple[int, ...] = ()
    for i, found in enumerate(above):
        if found != path[: len(found)]:
            return False
        path = (*found, i)
    return True


def _numbers(segments: Sequence[int], above: Sequence[tuple[int, ...]] | None) -> tuple[Tensor, Tensor]:
    """Int32 (tokens,) twice: the first token behind all that is below a token's segment, and its place in its row."""
    paths = above or ((),) * len(segments)
    stops = list(accumulate(segments))
    ends = list(stops)
    for stop, path in zip(stops, paths, strict=True):
        for i in path:
            ends[i] = stop
    lengths = torch.tensor(segments)
    shift = torch.tensor([sum(segments[i] for i in path) for path in paths]) - torch.tensor(stops) + lengths
    last, moved = (torch.repeat_interleave(t, lengths) for t in (torch.tensor(ends), shift))
    return last.int(), (torch.arange(len(last)) + moved).int()


def _block_mask(last: Tensor, position: Tensor, window: int | None) -> BlockMask:
    tokens, device = len(last), last.device
    # Two at least: a size of one would be compiled for itself.
    blocks = max(2, -(-tokens // _BLOCK))
    number = torch.arange(blocks, device=device)
    query, key, starts = number[:, None], number, number * _BLOCK
    # No last(j) is behind the last token, so that blocks of pads are not seen and one with pads is never full.
    seen = (key <= query) & (starts[:, None] < _by_block(last, blocks, 0).amax(1))
    full = (key < query) & ((starts + _BLOCK)[:, None] <= _by_block(last, blocks, 0).amin(1))
    reach = None
    if window is not None:
        reach = position + window
        # In a block without tokens nothing is seen anyway, whatever stands for its positions.
        seen &= _by_block(position, blocks, tokens).amin(1)[:, None] < _by_block(reach, blocks, 0).amax(1)
        full &= _by_block(position, blocks, 0).amax(1)[:, None] < _by_block(reach, blocks, tokens + window).amin(1)
    partial = seen & ~full
    return BlockMask.from_kv_blocks(
        *_listed(partial),
        *_listed(full),
        BLOCK_SIZE=_BLOCK,
        mask_mod=_visible(last) if reach is None else _visible_within(last, position, reach),
        seq_lengths=(tokens, tokens),
    )


def _by_block(numbers: Tensor, blocks: int, pad: int) -> Tensor:
    """(blocks, tokens of a block) of (tokens,)."""
    return F.pad(numbers, (0, blocks * _BLOCK - len(numbers)), value=pad).view(blocks, _BLOCK)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Int32 (1, 1, rows), how many blocks of a row are set, and (1, 1, rows, columns), their numbers before others."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


def _visible(last: Tensor) -> MaskMod:
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001 - flex gives four
        return (key <= query) & (query < last[key])

    return visible


def _visible_within(last: Tensor, position: Tensor, reach: Tensor) -> MaskMod:
    # The window in a tensor: a number would be compiled in, or made a symbol that not every kernel takes.
    def visible_within(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001 - flex gives four
        return (key <= query) & (query < last[key]) & (position[query] < reach[key])

    return visible_within


@lru_cache(maxsize=64)
def _works(kind: _Kind) -> bool:
    """Whether attention is compiled here, and gives what the plain formula gives, with the same gradients.

    Compiling needs Triton, a C compiler and a device that both know; the result is used again for what is asked later.
    """
    if not triton_available(kind.device):
        if kind.device.type == "cuda":
            _log.warning("attention goes segment by segment, which is slower: there is no Triton for this device")
        return False
    try:
        most, name = _furthest(kind)
    except Exception as error:  # noqa: BLE001 - dynamo, inductor, Triton and the C compiler raise what they like
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    else:
        if most <= _TOLERANCE:
            return True
        why = f"{name} deviates from the plain formula by {most:.1%}"
    _log.warning("attention goes segment by segment, which is slower: compiling it failed here (%s)", why)
    return False


def _furthest(kind: _Kind) -> tuple[float, str]:
    """The largest relative deviation from the plain formula in fp32, of the output or a gradient, and of which."""
    device, heads, dims = kind.device, kind.heads, kind.dims
    segments, above = (150, 30, 20, 90), ((), (0,), (0,), ())
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]), (heads[0], dims[1]))
    window = 64 if kind.windowed else None
    # Hooks of a caller (recomputation counts what is kept) are none of this one's; nor is its mode.
    with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(lambda t: t, lambda t: t):
        drawn = [torch.randn(1, sum(segments), *shape, generator=generator).to(device, kind.dtype) for shape in shapes]
        mask = block_mask_of(segments, above, window, device)
        assert mask is not None, "these segments are depth first"
        last, position = (t.to(device) for t in _numbers(segments, above))
        tokens = torch.arange(len(last), device=device)
        visible = _visible(last) if window is None else _visible_within(last, position, position + window)
        dense = visible(tokens, tokens, tokens[:, None], tokens)
        results = []
        for wide in (False, True):
            q, k, v, grad = (t.float() if wide else t for t in drawn)
            q, k, v = (t.transpose(1, 2).detach().requires_grad_() for t in (q, k, v))
            y = _plain(q, k, v, dense, kind.scale) if wide else flex_tree_attention(q, k, v, mask, kind.scale)
            results.append((y, *torch.autograd.grad(y, (q, k, v), grad)))
    names = ("the output", "the gradient of queries", "the gradient of keys", "the gradient of values")
    pairs = zip(names, *results, strict=True)
    return furthest((deviation(mine.detach(), right.detach()), name) for name, mine, right in pairs)


def _plain(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float | None) -> Tensor:
    """The formula over all pairs of tokens that `visible`, bool (tokens, tokens), shows: (1, tokens, heads, dim)."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    output: Tensor = scores.masked_fill(~visible, -math.inf).softmax(-1) @ value
    return output.transpose(1, 2)
