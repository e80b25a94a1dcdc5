"""Whether an adapter's base and tokenizer are those at hand, by the hashes that its files hold."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loratune.adapt.plan import TargetPlan
from loratune.adapter import Origin, SavedAdapter
from loratune.errors import AdapterFileError
from loratune.quant import Sample

_log = logging.getLogger("loratune")


def base_hash(
    tensors: Iterable[tuple[str, Tensor | Sample]], target_plan: TargetPlan, kept: Mapping[str, Tensor]
) -> str | None:
    """Which base an adapter with this plan stands on: all but the tensors that it has its own of.

    A new head is drawn anew whenever the base is loaded, and the adapter brings its own.

    Args:
        tensors: of the base, by name; of those that are quantised, what they were known by before.
        kept: what merged tensors were before.

    Returns:
        None for a base in fp16: its values are rounded otherwise than the hash rounds those of fp32 and bf16.
    """
    # Not imported above: a model of plain torch needs no transformers until an adapter is saved or loaded.
    from loratune.model import fingerprint

    own = {full for part in target_plan.whole for full in part.full_names()}
    rows = {f"{path}.weight": part.tokens for part in target_plan.token_rows for path in part.paths}
    base = [(name, kept.get(name, tensor)) for name, tensor in tensors if name not in own]
    base = [(name, _without(tensor, rows[name]) if name in rows else tensor) for name, tensor in base]
    if any(isinstance(tensor, Tensor) and tensor.dtype == torch.float16 for _, tensor in base):
        return None
    return fingerprint(base, finite=False)


def _without(tensor: Tensor | Sample, rows: tuple[int, ...]) -> Tensor | Sample:
    """A table without rows that the adapter brings: those of new tokens are drawn anew too."""
    if not isinstance(tensor, Tensor):
        return tensor
    return tensor.detach().index_fill(0, torch.tensor(rows, device=tensor.device), 0)


def say_what_is_odd(saved: SavedAdapter, where: str) -> list[str]:
    """Sentences about what a foreign file holds beyond an adapter; each is also logged as a warning."""
    notes = [f"{where}: the unknown key {key!r} is kept and means nothing here" for key in sorted(saved.unknown)]
    notes += [f"{where}: {key!r} is not needed: what it says stands elsewhere" for key in saved.surplus]
    for note in notes:
        _log.warning(note)
    return notes


def refuse_strangers(origin: Origin, where: str, base: str | None, tokenizer: Any) -> None:
    """Raise unless what is known on both sides agrees.

    Args:
        base: the hash of the base at hand; None where it has none, or any base will do.
        tokenizer: the one at hand, or None.
    """
    problems, hints = [], []
    if origin.base is not None and base is not None and base != origin.base:
        problems.append(f"{where}: it was trained on another base than this model")
        hints.append("load the base it was trained on, or say any_base=True")
    if tokenizer is not None:
        now = with_tokenizer(Origin(), tokenizer)
        for name, word in (("tokenizer", "tokenizer"), ("chat_template", "chat template")):
            before = getattr(origin, name)
            if before is not None and before != getattr(now, name):
                problems.append(f"{where}: it was trained with another {word}")
                hints.append("take the tokenizer that stands beside the adapter")
    if problems:
        raise AdapterFileError(problems, hint="; ".join(dict.fromkeys(hints)))


def with_tokenizer(origin: Origin, tokenizer: Any) -> Origin:
    # Not imported above: a model of plain torch needs no transformers.
    from loratune.model import tokenizer_hashes

    tokenizer_hash, template_hash = tokenizer_hashes(tokenizer)
    return replace(origin, tokenizer=tokenizer_hash, chat_template=template_hash)
