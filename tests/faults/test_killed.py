"""A training process killed at any moment: the folder can be looked at, and the same command ends in the same bits."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import Place, Whole, goes_on
from tests.faults.moments import PHASES
from tests.faults.warmed import Ended, Warmed

Counted = Callable[..., None]

# How many moments of each phase, evenly spaced over it; and how many calls of functions and times are drawn.
KILLS = {"start": 10, "step": 10, "validation": 6, "checkpoint": 18, "checks": 6, "final save": 20, "between": 6}
CALLS, TIMES = 12, 8
# Of these, what every test run does.
ALWAYS = {("start", 4), ("step", 4), ("validation", 3), ("checkpoint", 8), ("final save", 6)}


def chosen() -> list[object]:
    return [
        pytest.param(phase, index, marks=() if (phase, index) in ALWAYS else pytest.mark.full)
        for phase, count in KILLS.items()
        for index in range(count)
    ]


def test_all_phases_are_killed(whole: Whole) -> None:
    assert set(KILLS) == set(PHASES)
    assert sum(KILLS.values()) >= 50
    for phase, count in KILLS.items():
        assert len(whole.of(phase)) >= count, phase


@pytest.mark.parametrize(("phase", "index"), chosen())
def test_killed_at_a_named_moment(
    phase: str, index: int, place: Place, whole: Whole, warmed: Warmed, tmp_path: Path, counted: Counted
) -> None:
    moments = whole.of(phase)
    number = moments[index * len(moments) // KILLS[phase]]
    killed = warmed("watched", words=place.train, place=str(place.root), fault={"what": "kill", "at": number})
    assert killed.code == -signal.SIGKILL, killed.printed
    assert killed.said["struck"].startswith(f"{phase}:")
    looked_at(place, warmed, tmp_path, counted)
    goes_on(warmed, place, whole)
    counted("moment of a kill")


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.full) for n in range(1, CALLS))])
def test_killed_at_any_call_and_again(
    seed: int, place: Place, whole: Whole, warmed: Warmed, tmp_path: Path, counted: Counted
) -> None:
    """Before a call drawn from all of them; and the process that goes on is killed too, before one of its own."""
    dice = random.Random(seed)

    def killed_early() -> Ended:
        fault = {"what": "kill", "at": dice.randrange(1, whole.calls), "of_calls": True}
        return warmed("watched", words=place.train, place=str(place.root), fault=fault)

    first = killed_early()
    assert first.code == -signal.SIGKILL, first.printed
    looked_at(place, warmed, tmp_path, counted)
    second = killed_early()
    assert second.code in (-signal.SIGKILL, 0), second.printed  # one that has less to do may be done before
    goes_on(warmed, place, whole)
    counted("moment of a kill")
    counted("moment of a second kill", int(second.code != 0))


@pytest.mark.full
@pytest.mark.parametrize("seed", range(TIMES))
def test_killed_at_any_time(
    seed: int, place: Place, whole: Whole, warmed: Warmed, tmp_path: Path, counted: Counted
) -> None:
    """By another process's clock, which also meets the inside of one long call."""
    after = random.Random(seed).uniform(0, 0.9 * whole.seconds)
    killed = warmed("command", words=place.train, signal_after=(after, signal.SIGKILL))
    assert killed.code in (-signal.SIGKILL, 0), killed.printed
    looked_at(place, warmed, tmp_path, counted)
    goes_on(warmed, place, whole)
    counted("moment of a kill", int(killed.code != 0))


def looked_at(place: Place, warmed: Warmed, tmp_path: Path, counted: Counted) -> None:
    """On a copy, since a reader may finish what was interrupted."""
    copy = Place(tmp_path / "copy", place.base, place.data)
    shutil.copytree(place.root, copy.root)
    for command in (["show"], ["report"], ["eval", "--data", str(place.data), "--answers", "0"]):
        name, *options = command
        looked = warmed("command", words=[name, str(copy.run), *options])
        assert looked.is_typed, f"{name}: {looked.printed}"
        assert (copy.run / "record.json").exists() or looked.code == 1, looked.printed
        counted("look at what a kill left")
