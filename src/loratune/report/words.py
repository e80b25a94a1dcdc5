"""Numbers as people read them, and the outcome of a run as a sentence."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loratune.report.curves import Outcome
from loratune.report.folder import Check, Run

Tone = Literal["good", "warn", "bad"]

_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_NARROW = "\u202f"  # between a number and its unit: they stay on one line


def count(value: float) -> str:
    return f"{value:,.0f}"


def counted(value: float, noun: str) -> str:
    """`1 row`, `1,204 rows`."""
    return f"{count(value)} {noun if value == 1 else noun + 's'}"


def short(value: float) -> str:
    """`410`, `4.88 M`, `135 M`, `1.1 B`: three digits and a prefix."""
    for power, prefix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= power:
            unit = 1e3 if prefix == "k" else power
            return f"{_three(value / unit)}{_NARROW}{prefix}"
    return f"{value:,.0f}" if abs(value) >= 100 or value % 1 == 0 else f"{value:.3g}"


def size(value: float) -> str:
    """Bytes: `1.83 GB` (decimal, as memory is sold and disks are counted)."""
    for power, unit in _UNITS:
        if abs(value) >= power:
            return f"{_three(value / power)}{_NARROW}{unit}"
    return f"{value:.0f}{_NARROW}B"


def size_like(largest: float) -> Callable[[float], str]:
    """Formats bytes in the unit that `size` gives the largest of them, so that the ticks of an axis share it."""
    unit, name = next((pair for pair in _UNITS if largest >= pair[0]), (1, "B"))
    return lambda value: f"{value / unit:g}{_NARROW}{name}" if value else "0"


def _three(value: float) -> str:
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration(seconds: float) -> str:
    """`0.8 s`, `42 s`, `3 min 12 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < 9.95 or not math.isfinite(seconds):
        return f"{seconds:.1f}{_NARROW}s"
    whole = round(seconds)
    for unit, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            rest = whole % unit // part
            return f"{whole // unit}{_NARROW}{name}" + (f"\u00a0{rest}{_NARROW}{part_name}" if rest else "")
    return f"{whole}{_NARROW}s"


def percent(share: float) -> str:
    if share in {0, 1}:
        return f"{share:.0%}"
    value = 100 * share
    return f"{value:.1f}%" if abs(value) >= 10 else f"{value:.2f}%" if abs(value) >= 0.1 else f"{value:.2g}%"


def rate(value: float) -> str:
    """A learning rate: `1.3e-3`, `2e-5`, `0.1`."""
    if value == 0 or not abs(value) < 0.01:  # written so that NaN is one of them
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def loss(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def losses(first: float, second: float) -> tuple[str, str]:
    """Both with as many decimals as it takes to tell them apart, four at most."""
    for digits in (2, 3):
        shown = f"{first:.{digits}f}", f"{second:.{digits}f}"
        if shown[0] != shown[1]:
            return shown
    return f"{first:.4f}", f"{second:.4f}"


def perplexity(value: float) -> str:
    """exp(loss): between how many tokens the model is as unsure as if it drew lots."""
    if value > math.log(1e6):
        return "over a million"
    result = math.exp(value)
    return f"{result:,.0f}" if result >= 100 else f"{result:.1f}" if result >= 2 else f"{result:.2f}"


def date(iso: str) -> str:
    """`14 March 2026, 09:26 UTC`; a text that is no date stays as it is."""
    try:
        moment = dt.datetime.fromisoformat(iso)
    except ValueError:
        return iso
    text = f"{moment.day} {_MONTHS[moment.month - 1]} {moment.year}, {moment:%H:%M}"
    return f"{text} {moment.tzname()}" if moment.tzinfo else text


def value_text(value: Any) -> str:
    """A setting's value."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return count(value) if value.is_integer() and abs(value) < 1e15 else rate(value)
    if isinstance(value, list):
        return ", ".join(value_text(item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}={value_text(item)}" for key, item in value.items()) or "none"
    return str(value) or "empty"


def place(value: Any) -> str:
    """Where a row stands, as the run wrote it: a number, `train.jsonl:12`, or the parts of such a name."""
    return ":".join(place(part) for part in value) if isinstance(value, list) else str(value)


def text_of(value: Any) -> str:
    """A prompt or answer: text, or the messages of a conversation."""
    if isinstance(value, list) and value and all(isinstance(item, dict) and "content" in item for item in value):
        return "\n\n".join(f"{item.get('role', 'message')}: {item['content']}" for item in value)
    return str(value)


@dataclass(frozen=True)
class Headline:
    text: str
    tone: Tone


def headline(run: Run, outcome: Outcome) -> Headline:
    """What came of the run, in a sentence or two."""
    record = run.record
    learned = _learned(record.result.train_loss, outcome, writes=record.task.writes)
    checked, failed = _checked(record.checks)
    seconds = record.measured.seconds
    took = f", {duration(seconds)}" if seconds is not None else ""
    if record.state == "finished":
        text = f"{learned} in {counted(outcome.steps, 'step')}{took}; {checked}."
    else:
        text = f"{_unfinished(record.state, outcome)}{took}. So far: {learned[0].lower()}{learned[1:]}; {checked}."
    is_bad = bool(failed) or record.state == "failed" or _change(outcome) > 0
    is_good = record.state == "finished" and _change(outcome) < 0
    return Headline(text, "bad" if is_bad else "good" if is_good else "warn")


def _change(outcome: Outcome) -> int:
    """-1 where the held-out loss fell, 1 where it rose, 0 where four decimals show no difference or one is unknown."""
    if outcome.base is None or outcome.tuned is None:
        return 0
    before, after = losses(outcome.base, outcome.tuned)
    return 0 if before == after else -1 if outcome.tuned < outcome.base else 1


def _learned(train_loss: float | None, outcome: Outcome, *, writes: bool) -> str:
    """What became of the loss; only of a model that writes it is one of tokens, and has a perplexity."""
    if outcome.base is not None and outcome.tuned is not None:
        before, after = losses(outcome.base, outcome.tuned)
        change = f" (perplexity {perplexity(outcome.base)} → {perplexity(outcome.tuned)})" if writes else ""
        if before == after:
            return f"Held-out loss stayed at {before}"
        return f"Held-out loss {'fell' if outcome.tuned < outcome.base else 'rose'} from {before} to {after}{change}"
    if outcome.tuned is not None:
        known = f" (perplexity {perplexity(outcome.tuned)})" if writes else ""
        return f"Held-out loss reached {loss(outcome.tuned)}{known}"
    if train_loss is not None and math.isfinite(train_loss):
        return f"Training loss reached {loss(train_loss)}, with no held-out rows to measure against"
    return "Nothing was measured"


def _unfinished(state: str | None, outcome: Outcome) -> str:
    steps = f"{count(outcome.steps)} of {counted(outcome.planned, 'step')}" if outcome.planned else ""
    done = steps or counted(outcome.steps, "step")
    if state == "running":
        return f"Not finished: {done} done when this page was written"
    if state in ("interrupted", "failed"):
        return f"{state.capitalize()} after {done}"
    return f"The record does not say whether this run ended; {done} done"


def _checked(checks: Sequence[Check]) -> tuple[str, list[str]]:
    """The outcome of the checks in words, and the names of those that failed."""
    done = [check for check in checks if check.passed is not None]
    failed = [check.name for check in done if not check.passed]
    if not done:
        return "no checks were made", failed
    if not failed:
        return (f"all {len(done)} checks passed" if len(done) > 1 else "its one check passed"), failed
    return f"{len(failed)} of {counted(len(done), 'check')} failed: {', '.join(failed)}", failed
