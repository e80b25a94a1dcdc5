"""Answers that stand in a text, against those that are right: as SQuAD measures them (Rajpurkar et al., 2016 and 2018).

Both are compared in lower case, without punctuation and articles. Where several answers are right, the nearest counts;
where none is, saying nothing is right.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def plain_words(text: str) -> list[str]:
    """What is compared of an answer. An article is removed after the punctuation, as SQuAD's script does."""
    return _ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def same_words(told: str, true: str) -> float:
    """1 where both say the same, else 0."""
    return float(plain_words(told) == plain_words(true))


def word_f1(told: str, true: str) -> float:
    """2 · common / (told + there) over the words of both, a repeated one as often as it is; 1 where both are empty."""
    a, b = plain_words(told), plain_words(true)
    if not a or not b:
        return float(a == b)
    return 2 * sum((Counter(a) & Counter(b)).values()) / (len(a) + len(b))


def of_best(measure: Callable[[str, str], float], told: Sequence[str], right: Sequence[Sequence[str]]) -> float:
    """The mean over the rows of the measure by the nearest of their right answers; those without a word are none."""
    rows = [[one for one in some if plain_words(one)] or [""] for some in right]
    return sum(max(measure(text, one) for one in some) for text, some in zip(told, rows, strict=True)) / len(rows)
