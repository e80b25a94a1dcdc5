"""Which token comes next: each row by its own settings, and by its own generator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loratune.errors import ConfigError

# Tokens among which the likeliest of some mass are looked for before all of them are sorted.
_FEW = 256
# Below it the likeliest token has all the mass, but for ties, and a division could leave fp32's range.
_COLDEST = 1e-5


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; temperature 0 takes the likeliest one.

    Raises:
        ConfigError: settings that no token can be chosen by.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens={self.max_new_tokens}: at least 1")
        if not 0 <= self.temperature < math.inf:  # NaN compares as nothing
            problems.append(f"temperature={self.temperature}: at least 0, and finite")
        if not 0 <= self.top_p <= 1:
            problems.append(f"top_p={self.top_p}: 0 to 1")
        if not -(2**63) <= self.seed < 2**63:
            problems.append(f"seed={self.seed}: what 64 bits hold")
        if problems:
            raise ConfigError(problems, hint="temperature 0 takes the likeliest token, top_p 1 leaves none out")

    @property
    def greedy(self) -> bool:
        return self.temperature < _COLDEST


GREEDY = Sampling()


def is_sound(logits: Tensor) -> Tensor:
    """(rows,) of (rows, vocabulary): whether there is no NaN or +inf, and something else than -inf."""
    return logits.amax(-1).isfinite()  # NaN where one is


def choose(
    logits: Tensor, samplings: Sequence[Sampling], dice: Sequence[torch.Generator | None]
) -> tuple[Tensor, Tensor]:
    """A token for each row.

    Args:
        logits: (rows, vocabulary); -inf for tokens that the model forbids.
        dice: of each row, used where it is not greedy.

    Returns:
        (rows,) int64, and (rows,) bool: whether the row's logits are sound. The token of a row that is not means
        nothing.
    """
    highest, tokens = logits.max(-1)
    sound = highest.isfinite()  # as `is_sound` says
    sampled = [row for row, sampling in enumerate(samplings) if not sampling.greedy]
    fine = sound.tolist() if sampled else []  # which waits for the device
    for row in sampled:
        if fine[row]:
            tokens[row] = _drawn(logits[row].float(), samplings[row], dice[row])
    return tokens, sound


def _drawn(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """One of the likeliest tokens whose mass reaches `top_p`."""
    p = ((logits - logits.max()) / sampling.temperature).softmax(-1)
    if sampling.top_p >= 1.0:
        return _by_mass(p, generator)
    likely, order = p.topk(min(_FEW, len(p)))
    if float(likely.sum()) < sampling.top_p:
        likely, order = p.sort(descending=True)
    before = likely.cumsum(-1) - likely
    kept = order[before < sampling.top_p] if sampling.top_p > 0 else order[:1]
    # In the vocabulary's order: which of two equal tokens is the likelier depends on rounding, and so on the batch.
    kept = kept.sort().values
    return kept[_by_mass(p[kept], generator)]


def _by_mass(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """A place drawn in proportion to p, by one number: where the running sum passes it."""
    wide = torch.float32 if p.device.type == "mps" else torch.float64  # which MPS has not
    sums = p.cumsum(-1, dtype=wide)
    thrown = torch.rand(1, dtype=wide, generator=generator).to(p.device) * sums[-1]
    # The product may round up to the whole sum, which the last place with some mass is the first to reach.
    return torch.minimum(torch.searchsorted(sums, thrown, right=True), torch.searchsorted(sums, sums[-1:]))[0]
