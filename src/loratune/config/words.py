"""How a setting that is more than a number or a word is written as one word, by a flag or after `--set`."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from loratune.config.lora import NO_TARGETS
from loratune.errors import ConfigError


def read_word(name: str, value: str) -> Any:
    """What `value` says about the setting `name` (a field of `TrainConfig`); itself where it needs no reading.

    Raises:
        ConfigError: it cannot be read.
    """
    return WORDS[name](value) if name in WORDS else value


def _number_or_word(value: str) -> Any:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _targets(value: str) -> Any:
    """`none` leaves what trains to other settings."""
    return NO_TARGETS if value in ("none", NO_TARGETS) else _names(value)


def _names(value: str) -> Any:
    """A comma list of module names; `all-linear` and regular expressions stay strings."""
    if value == "all-linear" or not re.fullmatch(r"[\w.,\- ]+", value):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _indices(value: str, flag: str = "--layers") -> tuple[int, ...]:
    """`0,1,5-8` as indices."""
    found: list[int] = []
    for part in value.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise ConfigError(f"{flag} {value!r}: write indices and ranges like 0,1,5-8")
        first = int(match[1])
        found += range(first, int(match[2] or first) + 1)
    return tuple(found)


def _pairs(value: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in value.split(",")]
    if any(not equals or not key.strip() or not item.strip() for key, equals, item in pairs):
        raise ConfigError(f"--columns {value!r}: write ours=theirs, separated by commas")
    return {key.strip(): item.strip() for key, _, item in pairs}


def _init(value: str) -> Any:
    return {"true": True, "false": False}.get(value.lower(), value)


def _words(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


WORDS: dict[str, Callable[[str], Any]] = {
    "val": _number_or_word,
    "warmup": _number_or_word,
    "target_modules": _targets,
    "exclude_modules": _names,
    "layers_to_transform": _indices,
    "trainable_token_indices": partial(_indices, flag="--train-tokens"),
    "columns": _pairs,
    "init_lora_weights": _init,
    "log_with": _words,
    "modules_to_save": _words,
    "target_parameters": _words,
}
