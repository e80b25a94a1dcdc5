"""Dropout masks that are a function of what is computed, not of when.

The mask of a token in a layer comes from a counter (seed, step, layer, token) through an integer hash. Recomputing a
layer, resuming a run or splitting a step into other micro-batches therefore sees the same masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loratune.errors import AdapterStateError

_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class TokenCounter:
    """Where the present micro-batch stands.

    Attributes:
        tokens: int64, the shape of `input_ids`: each token's index in the step's canonical order.
    """

    seed: int
    step: int
    tokens: Tensor


def drop(x: Tensor, p: float, counter: TokenCounter, layer: int) -> Tensor:
    """x (..., tokens, features) with each feature zeroed with probability `p`, the others divided by 1 - p.

    Raises:
        AdapterStateError: x holds another number of tokens than are counted, so that nobody knows which they are.
    """
    if x.shape[:-1].numel() != counter.tokens.numel():
        raise AdapterStateError(
            f"lora_dropout in a module that sees {x.shape[:-1].numel()} of {counter.tokens.numel()} tokens (an expert "
            "does): its masks would depend on the micro-batch",
            hint="train with lora_dropout=0, or leave these modules out of target_modules",
        )
    tokens = counter.tokens.reshape(x.shape[:-1])  # some models flatten the batch on the way
    keep = keep_mask(tokens, x.shape[-1], p, seed=counter.seed, step=counter.step, layer=layer)
    # As two factors: 1 / (1 - p) rounded to bf16 would shift the mean by up to 0.2 %.
    return (x * keep.to(x.dtype)).mul_(1.0 / (1.0 - p))


def keep_mask(tokens: Tensor, width: int, p: float, *, seed: int, step: int, layer: int) -> Tensor:
    """Bool (*tokens.shape, width), True with probability 1 - p."""
    key = _mix(_mix(_mix(seed) ^ step) ^ layer)
    rows = _hash(tokens.to(torch.int64) ^ _signed(key)).to(torch.int32)
    columns = _hash(torch.arange(width, device=tokens.device) ^ _signed(_mix(key))).to(torch.int32)
    # One 32-bit finaliser (Murmur3's constants) over the row's and the column's hash decides an element.
    bits = rows[..., None] ^ columns
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits ^= (bits >> shift) & (0xFFFFFFFF >> shift)
        bits *= factor - (1 << 32)
    bits ^= (bits >> 16) & 0xFFFF
    threshold = min(round(p * (1 << 32)), (1 << 32) - 1) - (1 << 31)
    return bits >= threshold


def _mix(value: int) -> int:
    """splitmix64 of a Python integer (Steele et al., "Fast splittable pseudorandom number generators", 2014)."""
    value = (value + _GOLDEN) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= (1 << 63) else value


def _hash(values: Tensor) -> Tensor:
    """splitmix64 of each int64; tensors wrap around, and logical shifts are masked arithmetic ones."""
    values = values + _signed(_GOLDEN)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ ((values >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return values ^ ((values >> 31) & ((1 << 33) - 1))
