"""Generated answers against references."""

from __future__ import annotations

from collections.abc import Sequence


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers that equal their reference but for surrounding white space."""
    pairs = list(zip(answers, references, strict=True))
    return sum(answer.strip() == reference.strip() for answer, reference in pairs) / len(pairs)
