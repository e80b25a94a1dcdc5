"""Numbers as people read them, and the headline in every state."""

from __future__ import annotations

import math
from typing import Any

import pytest

from loratune.report import words
from loratune.report.curves import Outcome
from loratune.report.folder import Check, Measured, Record, Result, Run


def plain(text: str) -> str:
    return text.replace("\u202f", " ").replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min"),
        (192.4, "3 min 12 s"),
        (3600, "1 h"),
        (7530, "2 h 5 min"),
        (100_000, "1 d 3 h"),
        (math.inf, "inf s"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert plain(words.duration(seconds)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1.83e9, "1.83 GB"), (24e9, "24 GB"), (141.4e9, "141 GB"), (2e12, "2 TB")],
)
def test_size(value: float, text: str) -> None:
    assert plain(words.size(value)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.45, "0.45"), (410, "410"), (9999, "9,999"), (12_340, "12.3 k"), (4_884_480, "4.88 M"), (7e9, "7 B")],
)
def test_short(value: float, text: str) -> None:
    assert plain(words.short(value)) == text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["count", "short", "size", "duration", "percent", "rate", "value_text"])
def test_no_number_is_too_strange(name: str, value: float) -> None:
    assert getattr(words, name)(value)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0013, "1.3e-3"), (2e-5, "2e-5"), (0.1, "0.1"), (0, "0"), (1.625e-4, "1.62e-4")]
)
def test_rate(value: float, text: str) -> None:
    assert words.rate(value) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0%"), (1, "100%"), (0.035, "3.50%"), (0.61, "61.0%"), (0.00042, "0.042%")]
)
def test_percent(share: float, text: str) -> None:
    assert words.percent(share) == text


@pytest.mark.parametrize(
    ("pair", "shown"),
    [
        ((2.04, 1.31), ("2.04", "1.31")),
        ((2.041, 2.0388), ("2.041", "2.039")),
        ((2.0401, 2.0402), ("2.0401", "2.0402")),
        ((2.0, 2.0), ("2.0000", "2.0000")),
    ],
)
def test_losses_show_their_difference(pair: tuple[float, float], shown: tuple[str, str]) -> None:
    assert words.losses(*pair) == shown


@pytest.mark.parametrize(("loss", "text"), [(0.0, "1.00"), (1.31, "3.7"), (5.0, "148"), (50.0, "over a million")])
def test_perplexity(loss: float, text: str) -> None:
    assert words.perplexity(loss) == text


@pytest.mark.parametrize(
    ("iso", "text"),
    [
        ("2026-03-14T09:26:53Z", "14 March 2026, 09:26 UTC"),
        ("2026-03-14T09:26:53+02:00", "14 March 2026, 09:26 UTC+02:00"),
        ("2026-03-14T09:26:53", "14 March 2026, 09:26"),
        ("yesterday", "yesterday"),
    ],
)
def test_date(iso: str, text: str) -> None:
    assert words.date(iso) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not set"),
        (True, "on"),
        (3.0, "3"),
        (0.0013, "1.3e-3"),
        ([], "none"),
        (["q", "v"], "q, v"),
        ({"a": 1}, "a=1"),
        ("", "empty"),
    ],
)
def test_setting_values(value: Any, text: str) -> None:
    assert words.value_text(value) == text


def _headline(
    outcome: Outcome, state: str | None = "finished", checks: tuple[Check, ...] = (), **result: Any
) -> words.Headline:
    record = Record(state=state, checks=checks, result=Result(**result), measured=Measured(seconds=60))
    return words.headline(Run(record, None, None, ()), outcome)


@pytest.mark.parametrize(
    ("outcome", "state", "tone", "text"),
    [
        (
            Outcome(2.0, 1.0, 9, 9),
            "finished",
            "good",
            "Held-out loss fell from 2.00 to 1.00 (perplexity 7.4 → 2.7) in 9 steps, 1 min;",
        ),
        (
            Outcome(1.0, 2.0, 1, 1),
            "finished",
            "bad",
            "Held-out loss rose from 1.00 to 2.00 (perplexity 2.7 → 7.4) in 1 step, 1 min;",
        ),
        (Outcome(2.0, 2.0, 9, 9), "finished", "warn", "Held-out loss stayed at 2.0000 in 9 steps, 1 min;"),
        (
            Outcome(None, 1.0, 9, 9),
            "finished",
            "warn",
            "Held-out loss reached 1.00 (perplexity 2.7) in 9 steps, 1 min;",
        ),
        (
            Outcome(None, None, 9, 9),
            "finished",
            "warn",
            "Training loss reached 1.50, with no held-out rows to measure against in",
        ),
        (
            Outcome(None, None, 3, 9),
            "failed",
            "bad",
            "Failed after 3 of 9 steps, 1 min. So far: training loss reached 1.50",
        ),
        (Outcome(2.0, 1.0, 3, 9), "running", "warn", "Not finished: 3 of 9 steps done when this page was written"),
        (
            Outcome(2.0, 1.0, 3, None),
            "interrupted",
            "warn",
            "Interrupted after 3 steps, 1 min. So far: held-out loss fell",
        ),
    ],
)
def test_headline(outcome: Outcome, state: str, tone: str, text: str) -> None:
    found = _headline(outcome, state, train_loss=1.5)
    assert plain(found.text).startswith(text)
    assert found.tone == tone


def test_headline_counts_checks() -> None:
    good, bad, skipped = Check("a", passed=True), Check("b", passed=False), Check("c")
    outcome = Outcome(2.0, 1.0, 9, 9)
    assert _headline(outcome, checks=(good, good, skipped)).text.endswith("; all 2 checks passed.")
    assert _headline(outcome, checks=(good,)).text.endswith("; its one check passed.")
    assert _headline(outcome, checks=(skipped,)).text.endswith("; no checks were made.")
    found = _headline(outcome, checks=(good, bad))
    assert found.text.endswith("; 1 of 2 checks failed: b.")
    assert found.tone == "bad"
