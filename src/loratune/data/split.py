"""Which rows are held out, before anything else looks at the data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loratune.data.example import Corpus, Example, Place, content_of
from loratune.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Split:
    """Training and held-out rows, each in the order of the data.

    Args:
        duplicates: (train place, val place) for every held-out row whose content also stands in `train`; the first
            such place.
    """

    train: tuple[Example, ...]
    val: tuple[Example, ...]
    duplicates: tuple[tuple[Place, Place], ...]


def split(corpus: Corpus, val: float | Corpus, seed: int) -> Split:
    """Hold rows out.

    Rows are ranked by a hash of seed and content: no generator, process or row order has a part in it, and equal rows
    fall on the same side (unless only part of them fits the count). So a row that is added or removed hardly moves the
    others.

    Args:
        val: a share in (0, 1), a count, 0 for none, or a corpus that is the validation set.

    Raises:
        ConfigError: `val` is negative, a boolean, or neither a share nor a whole number.
        DataError: nothing would be left to train on.
    """
    if isinstance(val, Corpus):
        return Split(corpus.examples, val.examples, _duplicates(corpus.examples, val.examples))
    count = _count(val, len(corpus.examples))
    contents = [hashlib.sha256(content_of(example)).digest() for example in corpus.examples]
    held = _held_out(contents, count, seed)
    train = tuple(example for index, example in enumerate(corpus.examples) if index not in held)
    out = tuple(corpus.examples[index] for index in sorted(held))
    return Split(train, out, _duplicates(train, out))


def _count(val: Any, rows: int) -> int:
    if isinstance(val, bool) or not isinstance(val, int | float) or not 0 <= val < float("inf"):
        raise ConfigError(f"val={val!r}: not a share, a count or a corpus", hint="use a share like 0.1, a count, or 0")
    if val >= 1 and val != int(val):
        raise ConfigError(f"val={val!r}: neither a share below 1 nor a whole number", hint="use a share like 0.1")
    count = int(val) if val >= 1 or val == 0 else max(1, round(val * rows))
    if count and count >= rows:
        raise DataError(
            f"val={val!r} holds out {count} of {rows} rows: none would be left to train on",
            hint="hold out fewer rows, or none with --val 0",
        )
    return count


def _held_out(contents: Sequence[bytes], count: int, seed: int) -> set[int]:
    groups: dict[bytes, list[int]] = {}
    for index, content in enumerate(contents):
        groups.setdefault(content, []).append(index)
    salt = f"{seed}:".encode()
    ranked = sorted(groups.values(), key=lambda group: hashlib.sha256(salt + contents[group[0]]).digest())
    held: set[int] = set()
    for group in ranked:
        if len(held) + len(group) <= count:
            held.update(group)
    # What is missing can only come from a group that is larger than the gap.
    rest = [index for group in ranked for index in group if index not in held]
    return held | set(rest[: count - len(held)])


def _duplicates(train: Sequence[Example], val: Sequence[Example]) -> tuple[tuple[Place, Place], ...]:
    first: dict[bytes, Place] = {}
    wanted = {hashlib.sha256(content_of(example)).digest(): example.place for example in val}
    for example in train if wanted else ():
        content = hashlib.sha256(content_of(example)).digest()
        if content in wanted:
            first.setdefault(content, example.place)
    return tuple(
        (first[content], example.place)
        for example in val
        if (content := hashlib.sha256(content_of(example)).digest()) in first
    )
