"""Spans of tagged words, and how many of them are found: B-X begins one of X, I-X goes on with it.

Spans are read as CoNLL's scorer does (Tjong Kim Sang and De Meulder, 2003): an I-X that follows nothing of X begins
one, too. Tags without a prefix make a span of each run of words with the same one; O is in none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

OUTSIDE = "O"
Span = tuple[str, int, int]


def spans_of(tags: Sequence[str]) -> set[Span]:
    """(kind, first word, one past the last) of each span."""
    found: set[Span] = set()
    begun: tuple[str, int] | None = None
    for at, tag in enumerate([*tags, OUTSIDE]):
        prefix, dash, kind = tag.partition("-")
        if not (dash and prefix in ("B", "I")):
            prefix, kind = "I", tag
        goes_on = begun is not None and kind == begun[0] and prefix == "I" and tag != OUTSIDE
        if begun is not None and not goes_on:
            found.add((*begun, at))
            begun = None
        if begun is None and tag != OUTSIDE:
            begun = (kind, at)
    return found


def span_f1(told: Iterable[Sequence[str]], true: Iterable[Sequence[str]]) -> float:
    """2 · right / (told + there) over the spans of all rows; a span is right where kind and both ends are.

    1 where there are none and none were told.
    """
    right = count = 0
    for row, reference in zip(told, true, strict=True):
        a, b = spans_of(row), spans_of(reference)
        right += len(a & b)
        count += len(a) + len(b)
    return 2 * right / count if count else 1.0
