"""Adapters as values, with random tensors, and their dense updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from loratune.adapter import Factors, SavedAdapter
from loratune.config import LoraConfig
from tests.oracle import algebra
from tests.oracle.lora_reference import Array, exact, pattern_value

Shape = tuple[int, int, int]  # r, in, out


def adapter(
    modules: Mapping[str, Shape],
    *,
    alpha: float = 8,
    rslora: bool = False,
    seed: int = 0,
    bias: bool = False,
    **more: Any,
) -> SavedAdapter:
    """Random A (r, in) and B (out, r) for each module; `more` goes into the config."""
    dice = torch.Generator().manual_seed(seed)
    factors = {
        path: Factors(
            torch.randn(r, inner, generator=dice),
            torch.randn(outer, r, generator=dice),
            torch.randn(outer, generator=dice) if bias else None,
        )
        for path, (r, inner, outer) in modules.items()
    }
    config = LoraConfig(
        r=next(iter(modules.values()))[0],
        lora_alpha=alpha,
        use_rslora=rslora,
        lora_bias=bias,
        target_modules=tuple(modules),
        **more,
    )
    return SavedAdapter(config, factors)


def dense_of(saved: SavedAdapter) -> dict[str, Array]:
    """Every module's dense update; the scale is worked out here, from alpha, its patterns and the tensors' rank."""
    config = saved.config
    return {
        path: algebra.delta(
            exact(factors.A),
            exact(factors.B),
            pattern_value(config.alpha_pattern, path, config.lora_alpha),
            rslora=config.use_rslora,
        )
        for path, factors in saved.factors.items()
    }
