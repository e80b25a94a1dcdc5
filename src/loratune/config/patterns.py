"""Patterns that choose among module paths: regexes with an end, and names that are ends of paths."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from functools import lru_cache

import regex

from loratune.errors import ConfigError

# A pattern for the end of a path that starts at a dot.
ANCHORED = r"(.*\.)?({})"
# Seconds of CPU time for all matches of one pattern that take longer than ordinary ones, which take microseconds.
_PATIENCE, _ORDINARY = 1.0, 1e-3
# `regex` writes repeats out: this many characters take about 100 MB.
_LARGEST_PATTERN = 200_000
_REPEATS = re.compile(r"\{(\d+)(?:,\d*)?\}")
# What `re` reads as characters and `regex` does not: "{e<=1}", up to one error, and "[[:alpha:]]", a class.
_READ_OTHERWISE = re.compile(r"(?:\\.|[^\\])*?(?:\[:|\{(?!(?:\d+(?:,\d*)?|,\d*)\}))", re.DOTALL)


def first_match(patterns: Mapping[str, float], path: str) -> float | None:
    """The value of the first pattern that matches the path's end: a regex, anchored at a dot or the path's start."""
    return next((value for pattern, value in patterns.items() if pattern_matches(pattern, path)), None)


def name_matches(name: str, path: str) -> bool:
    """Whether a path is called by `name`: the whole path, or its end from a dot on."""
    return path == name or path.endswith("." + name)


def pattern_matches(pattern: str, path: str) -> bool:
    """Whether a regex matches the path's end from a dot or from its start; raises as `fully_matches`."""
    return _matcher(pattern, ANCHORED)(path)


def fully_matches(pattern: str, path: str) -> bool:
    """Whether a regex matches the whole path.

    Raises:
        ConfigError: the pattern takes too long, on this path or on all so far.
    """
    return _matcher(pattern, "{}")(path)


class _Matcher:
    """`re.fullmatch` with an end: a pattern like (a|aa)+, which anybody's file may hold, can run for years in `re`."""

    def __init__(self, pattern: str, form: str) -> None:
        self._pattern = pattern
        self._compiled = regex.compile(form.format(pattern), regex.VERSION0)
        self._patience = _PATIENCE

    def __call__(self, path: str) -> bool:
        begun = time.thread_time()
        try:
            found = self._compiled.fullmatch(path, timeout=self._patience)
        except TimeoutError:
            self._patience = 0.0
            raise ConfigError(
                f"the pattern {self._pattern!r} takes too long: given up at {path!r}",
                hint="leave out repeats of what repeats itself, such as (a+)+ or (.|.)*, or list the names",
            ) from None
        took = time.thread_time() - begun
        if took > _ORDINARY:
            self._patience = max(0.0, self._patience - took)
        return found is not None


@lru_cache(maxsize=1024)
def _matcher(pattern: str, form: str) -> _Matcher:
    return _Matcher(pattern, form)


def check_pattern(pattern: str, form: str = "{}") -> None:
    """Whether the pattern is one, alone and in the form in which it is used."""
    if _READ_OTHERWISE.match(pattern):
        raise ValueError(f"{pattern!r}: a brace that is no count is written \\{{, a bracket before ':' \\[")
    try:
        re.compile(pattern)
        re.compile(form.format(pattern))
        times = math.prod(int(number) or 1 for number in _REPEATS.findall(pattern))
        if times > 1 and times * len(pattern) > _LARGEST_PATTERN:
            raise ValueError(f"{pattern!r} repeats its parts {times} times, more than a name has")
        regex.compile(form.format(pattern), regex.VERSION0)
    except (re.error, regex.error, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
