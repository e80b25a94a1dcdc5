"""An adapter as other readers take it: plain low-rank terms of one rank whose scale is 1, and nothing beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loratune.adapter.spectrum import singular_values
from loratune.adapter.value import Factors, SavedAdapter
from loratune.config import LoraConfig
from loratune.config.methods import CALLED
from loratune.errors import AdapterFileError


class Plain(NamedTuple):
    """The plain adapter, and what was changed for it."""

    adapter: SavedAdapter
    notes: tuple[str, ...]


def plain(adapter: SavedAdapter, reader: str) -> Plain:
    """The same update with every scale folded into B, and every rank filled up with zeros to the largest.

    Readers scale by alpha / r of the config or of the tensors, without roots and patterns; where both are equal nothing
    can go wrong.

    Raises:
        AdapterFileError: it has what `reader` cannot hold; every such thing is listed.
    """
    problems = list(_beyond(adapter, reader))
    hint = "`loratune merge` it into its base, and export or serve that"
    if adapter.config.decomposes:
        init = adapter.config.init_lora_weights
        problems.insert(0, f"it starts from {init!r}: its update is relative to a changed base, which {reader} has not")
        if len(problems) == 1:
            hint = "attach it to its base and save it, which writes a plain adapter"
    if problems:
        raise AdapterFileError(problems, hint=hint)
    r = max(factors.A.shape[0] for factors in adapter.factors.values())
    scales = {path: adapter.scale(path) for path in adapter.factors}
    found = {path: _folded(factors, scales[path], r) for path, factors in adapter.factors.items()}
    config = LoraConfig(r=r, lora_alpha=r, target_modules=tuple(sorted(found)), task_type=adapter.config.task_type)
    return Plain(
        replace(adapter, config=config, factors=found, unknown={}, surplus=()), tuple(_notes(adapter, scales, r))
    )


def _folded(factors: Factors, scale: float, r: int) -> Factors:
    more = r - factors.A.shape[0]
    B = (factors.B.double() * scale).to(factors.B.dtype)  # rounded once
    return Factors(F.pad(factors.A, (0, 0, 0, more)).contiguous(), F.pad(B, (0, more)).contiguous())


def _notes(adapter: SavedAdapter, scales: dict[str, float], r: int) -> Iterator[str]:
    different = sorted(set(scales.values()))
    if different != [1.0]:
        shown = f"{different[0]:g}" if len(different) == 1 else f"{different[0]:g} to {different[-1]:g}"
        yield f"the scale, {shown}, is folded into B; alpha is r"
    ranks = sorted({factors.A.shape[0] for factors in adapter.factors.values()})
    if len(ranks) > 1:
        yield f"ranks from {ranks[0]} on are filled up with zeros to {r}"


def _beyond(adapter: SavedAdapter, reader: str) -> Iterator[str]:
    stretched = [path for path, factors in adapter.factors.items() if factors.magnitude is not None]
    biased = [path for path, factors in adapter.factors.items() if factors.bias is not None]
    unlike = [path for path, factors in adapter.factors.items() if factors.looked_up or factors.A.ndim > 2]
    stacked = [path for path, factors in adapter.factors.items() if factors.stack is not None]
    if adapter.vectors:
        yield f"{reader} knows no {CALLED[adapter.config.peft_type]}"
    elif not adapter.factors:
        yield f"it has no low-rank terms, and {reader} takes nothing else"
    if stretched:
        yield f"{reader} knows no DoRA: {stretched[0]}{_more(stretched)}"
    if biased:
        yield f"{reader} knows no bias behind B: {biased[0]}{_more(biased)}"
    if unlike:
        yield f"{reader} is given linear layers alone, no embedding or convolution: {unlike[0]}{_more(unlike)}"
    if stacked:
        yield f"{reader} is given linear layers alone, no stacked experts: {stacked[0]}{_more(stacked)}"
    if adapter.replaced:
        own = list(adapter.replaced)
        yield f"{reader} takes no tensors in the place of the base's: {own[0]}{_more(own)}"


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def same_update(one: SavedAdapter, other: SavedAdapter) -> float:
    """The largest relative difference of two adapters' scaled updates, module by module, in fp64.

    What is no single low-rank update (stacks, vectors, tensors in the base's place) counts as it is.
    """
    worst = 0.0
    others = dict(other.named_tensors())
    for name, tensor in one.named_tensors():
        path = name.partition(": ")[0]
        if path not in one.factors or one.factors[path].stack is not None:
            size, apart = float(tensor.double().norm()), float((tensor.double() - others[name].double()).norm())
            worst = max(worst, apart / size if size else apart)
    for path, factors in one.factors.items():
        if factors.stack is not None:
            continue
        A, B = _scaled(factors, one.scale(path))
        C, D = _scaled(other.factors[path], other.scale(path))
        size = float(singular_values(A, B).norm())
        apart = float(singular_values(torch.cat([A, C]), torch.cat([B, -D], 1)).norm())
        worst = max(worst, apart / size if size else apart)
    return worst


def _scaled(factors: Factors, scale: float) -> tuple[Tensor, Tensor]:
    return factors.A.double(), factors.B.double() * scale
