"""Which token comes next: each row by its own settings, and by its own generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Tokens among which the likeliest of some mass are looked for before all of them are sorted.
_FEW = 256


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; temperature 0 takes the likeliest one."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


def choose(logits: Tensor, samplings: Sequence[Sampling], dice: Sequence[torch.Generator | None]) -> Tensor:
    """A token for each row.

    Args:
        logits: (rows, vocabulary).
        dice: of each row, used where its temperature is above 0.

    Returns:
        (rows,) int64.
    """
    tokens = logits.argmax(-1)
    for row, (sampling, generator) in enumerate(zip(samplings, dice, strict=True)):
        if sampling.temperature > 0:
            tokens[row] = _drawn(logits[row].float() / sampling.temperature, sampling.top_p, generator)
    return tokens


def _drawn(logits: Tensor, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One of the likeliest tokens whose mass reaches `top_p`, by the Gumbel trick: the largest of logit + noise.

    The noise of a token does not depend on which others are left, so that nothing has to be normalised or sorted where
    all are.
    """
    noise = torch.empty(logits.shape, device="cpu").exponential_(generator=generator).log_().neg_().to(logits.device)
    if top_p >= 1.0:
        return (logits + noise).argmax()
    p = logits.softmax(-1)
    likely, order = p.topk(min(_FEW, len(p)))
    if float(likely.sum()) < top_p:
        likely, order = p.sort(descending=True)
    before = likely.cumsum(-1) - likely
    kept = order[before < top_p] if top_p > 0 else order[:1]
    return kept[(logits[kept] + noise[kept]).argmax()]
