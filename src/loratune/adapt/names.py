"""What the paths of a model's modules and parameters say."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

_SHOWN = 40


def short_name(path: str) -> str:
    """The end of a path; a place in a list has the list's name before it."""
    *before, last = path.split(".")
    return f"{before[-1]}.{last}" if before and last.isdigit() else last


def last_names(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(map(short_name, paths)))


def layer_of(path: str, lists: tuple[str, ...] | None = None) -> int | None:
    """The index in the outermost list of layers on the path: the first number, not an expert's further in."""
    for before, part in pairwise(path.split(".")):
        if part.isdigit() and (lists is None or before in lists):
            return int(part)
    return None


def linears_there(paths: Iterable[str]) -> str:
    """The names that a model's linear modules have, for whoever named others."""
    names = last_names(paths)
    if not names:
        return "it has no linear modules"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"linear modules of this model: {', '.join(names[:_SHOWN])}{more}"
