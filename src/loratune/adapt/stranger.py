"""Whether an adapter's base and tokenizer are those at hand, by the hashes that its files hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from loratune.adapter import Origin
from loratune.errors import AdapterFileError


def refuse_strangers(origin: Origin, where: str, base: Callable[[], str] | None, tokenizer: Any) -> None:
    """Raise unless what is known on both sides agrees.

    Args:
        base: gives the hash of the base at hand; None where any base will do.
        tokenizer: the one at hand, or None.
    """
    problems, hints = [], []
    if origin.base is not None and base is not None and base() != origin.base:
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
