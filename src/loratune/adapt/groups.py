"""What an optimizer is given: groups of parameters with their rates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from loratune.errors import ConfigError
from loratune.lora import LowRank, Term


def param_groups(
    terms: Iterable[Term], parameters: Sequence[nn.Parameter], lr: float, b_ratio: float, weight_decay: float
) -> list[dict[str, Any]]:
    """`parameters` in groups by rate and decay; what stands behind the inner features (B) learns at `b_ratio` · lr."""
    problems = [
        f"{name}={value!r} is not a positive number"
        for name, value in (("lr", lr), ("lora_plus_ratio", b_ratio))
        if not (math.isfinite(value) and value > 0)
    ]
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        problems.append(f"weight_decay={weight_decay!r} is not a number from 0")
    low_ranks = [term for term in terms if isinstance(term, LowRank)]
    if b_ratio != 1.0 and parameters and not low_ranks:
        problems.append(f"lora_plus_ratio={b_ratio!r}: no adapter here has a B")
    if problems:
        raise ConfigError(problems, hint="lr=2e-4, lora_plus_ratio=16 and weight_decay=0.01 are usual")
    behind_b = {id(p) for low_rank in low_ranks for p in (low_rank.outer, low_rank.bias) if p is not None}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        rate = lr * b_ratio if id(parameter) in behind_b else lr
        decay = weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]
