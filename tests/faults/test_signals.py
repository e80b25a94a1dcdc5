"""Ctrl-C and SIGTERM at any moment: exit 130 with what is needed to go on, or the run is finished; never half of it."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from loratune.training.checkpoint import latest_checkpoint
from tests.faults.conftest import Place, Whole, goes_on
from tests.faults.moments import PHASES
from tests.faults.warmed import Ended, Warmed

Counted = Callable[..., None]
EACH = 3
ALWAYS = {("step", 1, signal.SIGTERM), ("final save", 1, signal.SIGTERM)}


def signalled(warmed: Warmed, place: Place, number: int, at: int) -> Ended:
    fault = {"what": "signal", "number": number, "at": at}
    return warmed("watched", words=place.train, place=str(place.root), fault=fault)


@pytest.mark.parametrize(
    ("phase", "index", "number"),
    [
        pytest.param(
            phase,
            index,
            number,
            marks=() if (phase, index, number) in ALWAYS else pytest.mark.full,
            id=f"{phase}-{index}-{number.name}",
        )
        for phase in PHASES
        for index in range(EACH)
        for number in (signal.SIGINT, signal.SIGTERM)
    ],
)
def test_stopped_at_a_moment(
    phase: str, index: int, number: signal.Signals, place: Place, whole: Whole, warmed: Warmed, counted: Counted
) -> None:
    moments = whole.of(phase)
    ended = signalled(warmed, place, number, moments[index * len(moments) // EACH])
    assert ended.said is not None
    assert ended.code in (130, 0), ended.printed
    assert "Traceback" not in ended.printed
    if phase == "step":
        assert ended.code == 130
        # The step it came in is done, and its checkpoint is there.
        checkpoint, _ = latest_checkpoint(place.run / "checkpoints", place.record()["identity"])
        assert checkpoint is not None
        assert f"stopped after step {checkpoint.step} of 6, checkpoint saved" in ended.printed
        assert place.record()["state"] == "interrupted"
    if ended.code == 0:
        assert place.outcome() == whole.outcome
    if phase != "start":  # where there may be no record yet
        assert place.record()["state"] == ("interrupted" if ended.code else "finished")
    goes_on(warmed, place, whole)
    counted("moment of SIGINT or SIGTERM")
