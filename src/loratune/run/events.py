"""What a whole run says beyond the loop's events: lines for people, in the order they happen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loratune.training.events import Event, Noticed, StepDone, Validated

__all__ = ["Begun", "Event", "Noticed", "RunListener", "Said", "StepDone", "Validated"]


@dataclass(frozen=True, slots=True)
class Said:
    """One line of a run's screen: `topic` is its heading (data, plan, checks, …)."""

    topic: str
    text: str


@dataclass(frozen=True, slots=True)
class Begun:
    """Training starts, or goes on after `done` of `steps` steps."""

    done: int
    steps: int


RunListener = Callable[[Event | Said | Begun], None]
