"""What a comparison answers from its runs: which method costs quality, and when each run had the loss that all reach.

A run is what `contend` found of it; one that failed has "failed", a sentence, and no loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Runs = Sequence[Mapping[str, Any]]


def note_goal(runs: Sequence[dict[str, Any]]) -> float | None:
    """The worst loss that training came to; each run is given the point at which it first had it, as "to_goal".

    A run that ends no better than the best of the bases learned nothing and sets no goal: it would be reached at once.

    Returns:
        None where no run learned anything. "to_goal" is None in a run that never had that loss.
    """
    curves = [run["curve"] for run in runs if run.get("curve")]
    start = min((curve[0]["val_loss"] for curve in curves), default=-math.inf)
    goal = max((curve[-1]["val_loss"] for curve in curves if curve[-1]["val_loss"] < start), default=None)
    for run in runs:
        points = (point for point in run.get("curve", ()) if goal is not None and point["val_loss"] <= goal)
        run["to_goal"] = next(points, None)
    return goal


def verdict(first: str, other: str, measured: Mapping[str, Runs], tolerance: float) -> dict[str, Any]:
    """Whether the first method costs quality, in figures and in words.

    Compared seed by seed: the same order of rows, the same held-out ones. Worse is a mean difference above the
    tolerance. Where a run of either failed there is no answer.

    Returns:
        "regressed" and "difference" are None without an answer; "failed" has a line for each failed run of any method.
    """
    ours, theirs = measured[first], measured[other]
    changes = [_change(a, b) for a, b in zip(ours, theirs, strict=True)]
    known = [change for change in changes if change is not None]
    lost = list(_failures({first: ours, other: theirs}))
    mean = None if lost else sum(known) / len(known)
    return {
        "first": first,
        "other": other,
        "difference": mean,
        "differences": changes,
        "tolerance": tolerance,
        "regressed": None if mean is None else mean > tolerance,
        "failed": list(_failures(measured)),
        "text": f"no answer: {'; '.join(lost)}" if mean is None else _words(first, other, measured, known, tolerance),
    }


def _change(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float | None:
    if "failed" in ours or "failed" in theirs:
        return None
    if theirs["val_loss"] == 0:  # nothing is left to be better than
        return 0.0 if ours["val_loss"] == 0 else math.inf
    return float(ours["val_loss"] / theirs["val_loss"] - 1)


def _failures(measured: Mapping[str, Runs]) -> Iterable[str]:
    for method, runs in measured.items():
        for run in runs:
            if "failed" in run:
                seed = f", seed {run['seed']}" if "seed" in run else ""
                yield f"{method}{seed}: {run['failed']}"


def _words(first: str, other: str, measured: Mapping[str, Runs], changes: Sequence[float], tolerance: float) -> str:
    mean = sum(changes) / len(changes)
    ours, theirs = (sum(run["val_loss"] for run in runs) / len(runs) for runs in (measured[first], measured[other]))
    if mean > tolerance and min(changes) <= tolerance:
        words = f"{first} is worse than {other} here on average, not with every seed"
    elif mean > tolerance:
        words = f"{first} is worse than {other} here"
    elif mean < -tolerance:
        words = f"{first} is better than {other} here"
    else:
        words = f"{first} costs no quality against {other} here"
    spread = f", {min(changes):+.1%} to {max(changes):+.1%} over {len(changes)} seeds" if len(changes) > 1 else ""
    return f"{words}: held-out loss {ours:.4f} against {theirs:.4f} ({mean:+.1%}{spread}; tolerance {tolerance:.0%})"
