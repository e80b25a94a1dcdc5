"""What a comparison answers from its runs' losses, and from when on a run had the loss that all of them reach."""

from __future__ import annotations

from typing import Any

import pytest

from loratune.report.comparison import context_of, rows_of
from loratune.run.verdict import note_goal, verdict


@pytest.mark.parametrize(
    ("ours", "theirs", "regressed", "words"),
    [
        ([1.0, 1.0], [1.0, 1.01], False, "costs no quality"),
        ([1.1, 1.0], [1.0, 1.0], True, "is worse than full here on average, not with every seed"),
        ([1.03, 1.025], [1.0, 1.0], True, "lora is worse than full here: "),
        ([0.0, 0.0], [0.0, 0.0], False, "costs no quality"),
        ([1.03, 1.0], [1.0, 1.0], False, "costs no quality"),
        ([0.9, 0.9], [1.0, 1.0], False, "is better"),
    ],
)
def test_verdict(ours: list[float], theirs: list[float], regressed: bool, words: str) -> None:
    found = verdict("lora", "full", {"lora": lost(ours), "full": lost(theirs)}, 0.02)
    assert found["regressed"] is regressed
    assert found["failed"] == []
    assert words in found["text"]


def lost(losses: list[float]) -> list[dict[str, Any]]:
    return [{"seed": seed, "val_loss": loss} for seed, loss in enumerate(losses)]


def failed(seed: int, why: str = "held-out loss nan") -> dict[str, Any]:
    return {"seed": seed, "val_loss": None, "failed": why}


@pytest.mark.parametrize("which", ["lora", "full"])
def test_a_failed_run_is_no_answer(which: str) -> None:
    runs = {"lora": lost([1.0, 1.0]), "full": lost([1.0, 1.0])}
    runs[which][1] = failed(1)
    found = verdict("lora", "full", runs, 0.02)
    assert found["regressed"] is None
    assert found["difference"] is None
    assert found["differences"] == [0.0, None]
    assert found["failed"] == [f"{which}, seed 1: held-out loss nan"]
    assert found["text"] == f"no answer: {which}, seed 1: held-out loss nan"


def test_a_failed_run_of_a_third_method_is_named_and_leaves_the_answer() -> None:
    runs = {"lora": lost([1.5]), "full": lost([1.0]), "dora": [failed(0)]}
    found = verdict("lora", "full", runs, 0.02)
    assert found["regressed"] is True
    assert found["failed"] == ["dora, seed 0: held-out loss nan"]


def curve(*losses: float) -> dict[str, Any]:
    points = [
        {"step": step, "val_loss": loss, "tokens": 100 * step, "flops": 1e6 * step, "seconds": step / 2}
        for step, loss in enumerate(losses)
    ]
    return {"val_loss": losses[-1], "curve": points}


def test_the_goal_is_the_worst_that_training_came_to() -> None:
    fast, slow = curve(3.0, 2.0, 1.0), curve(3.0, 2.5, 2.0)
    assert note_goal([fast, slow]) == 2.0
    assert (fast["to_goal"]["step"], slow["to_goal"]["step"]) == (1, 2)


def test_a_run_that_ends_above_the_base_reaches_no_goal_and_sets_none() -> None:
    good, lost_it = curve(3.0, 2.0, 1.0), curve(3.0, 3.2, 3.5)
    assert note_goal([good, lost_it]) == 1.0
    assert good["to_goal"]["step"] == 2
    assert lost_it["to_goal"] is None


def test_a_base_that_starts_better_than_another_run_ends_is_no_goal_reached_at_step_0() -> None:
    """Quantised and dense bases start from different losses."""
    dense, coarse = curve(2.0, 1.5, 1.0), curve(3.0, 2.7, 2.5)
    assert note_goal([dense, coarse]) == 1.0
    assert coarse["to_goal"] is None


def test_no_goal_where_nothing_was_learned() -> None:
    runs = [curve(3.0, 3.2), curve(3.0, 3.0), failed(0)]
    assert note_goal(runs) is None
    assert all(run["to_goal"] is None for run in runs)


def test_the_table_says_what_was_not_reached() -> None:
    half = {"lora": [curve(3.0, 2.0, 1.0), curve(3.0, 4.0)], "full": [curve(3.0, 4.0), curve(3.0, 3.5)]}
    table = dict(rows_of(compared(half)))
    assert table["tokens to a loss of 1.0000"] == ["–", "200 (1 of 2 runs)", "not reached"]
    assert table["time to it"] == ["–", "1.0\u202fs (1 of 2 runs)", "not reached"]
    none = {"lora": [curve(3.0, 4.0)], "full": [curve(3.0, 3.5)]}
    assert not [name for name, _ in rows_of(compared(none)) if "to it" in name or "loss of" in name]
    context_of(compared(none))


def compared(methods: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    goal = note_goal([run for runs in methods.values() for run in runs])
    search = {"lr": 1e-3, "tried": [], "seconds": 0.0}
    first, other = methods
    for runs in methods.values():
        for seed, run in enumerate(runs):
            run["seed"] = seed
    return {
        "goal": goal,
        "base": {},
        "methods": {name: {"search": search, "runs": runs, "summary": {}} for name, runs in methods.items()},
        "verdict": verdict(first, other, methods, 0.02),
    }
