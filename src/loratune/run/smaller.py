"""Whether a smaller rank would have done: the trained update cut to it, and measured again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loratune.adapt import Adapters
from loratune.adapter import combine
from loratune.config.methods import LORA

# A rank is enough where the held-out loss is higher by no more than this share of it.
ENOUGH = 0.02


def smaller_ranks(lora: Adapters, evaluate: Callable[[], float], *, base: float, tuned: float) -> dict[str, Any] | None:
    """The held-out loss of the best approximation of each smaller rank, halving until one is no longer enough.

    The approximation is the one of the trained update (by SVD, module by module): a run with that rank from the start
    may do better, so that what is found to be enough is an upper bound.

    Returns:
        the least rank that is enough, and each that was tried with its loss; None where nothing was learned, or the
        update is no plain B A.
    """
    (name,) = lora.active
    low_ranks = lora.factors(name).values()
    plain = lora.config(name).peft_type == LORA and not lora.replaced(name)
    plain = plain and all(low_rank.magnitude is None for low_rank in low_ranks)
    if not low_ranks or not plain or not tuned < base:
        return None
    enough = rank = max(low_rank.r for low_rank in low_ranks)
    tried: list[dict[str, Any]] = []
    while rank > 1:
        rank //= 2
        loss = _loss_at(lora, rank, evaluate)
        tried.append({"r": rank, "val_loss": loss})
        if loss > (1 + ENOUGH) * tuned:
            break
        enough = rank
    return {"enough": enough, "val_loss": tuned, "tried": tried}


def _loss_at(lora: Adapters, rank: int, evaluate: Callable[[], float]) -> float:
    (name,) = lora.active
    cut = combine([lora.saved(name)], [1.0], method="svd", rank=rank).adapter
    lora.load(cut, "cut", any_base=True)
    lora.activate("cut")
    try:
        return evaluate()
    finally:
        lora.activate(name)
        lora.remove("cut")
