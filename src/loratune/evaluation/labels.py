"""How well labels are told: accuracy, and the mean over the labels of each one's F1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def accuracy(told: Sequence[int], true: Sequence[int]) -> float:
    """Share of labels that are right."""
    return sum(a == b for a, b in zip(told, true, strict=True)) / len(true)


def macro_f1(told: Sequence[int], true: Sequence[int]) -> float:
    """Mean of the labels' F1, of those that are there or were told: a rare label counts as much as a common one.

    F1 = 2 · right / (told + there), the harmonic mean of precision and recall (van Rijsbergen, 1979).
    """
    right = Counter(a for a, b in zip(told, true, strict=True) if a == b)
    count = Counter(told) + Counter(true)
    return sum(2 * right[label] / count[label] for label in count) / len(count)


def majority(true: Sequence[int]) -> float:
    """The accuracy of always telling the most frequent label: what a model has to beat."""
    return max(Counter(true).values()) / len(true)
