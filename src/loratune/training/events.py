"""What a run says while it goes on; consoles, files and trackers listen, the loop knows none of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimizer step. `loss` is the mean over its supervised tokens, in nats.

    `tokens` counts its examples whole and without pads, `computed_tokens` what went through the model.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    computed_tokens: int
    supervised_tokens: int
    examples: int
    step_seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True)
class Validated:
    """Mean loss over the held-out supervised tokens after `step` steps; step 0 is the base."""

    step: int
    val_loss: float


@dataclass(frozen=True, slots=True)
class Noticed:
    """An automatic decision or a change of plan."""

    step: int
    kind: str
    text: str


Measured = StepDone | Validated
Event = Measured | Noticed
Listener = Callable[[Event], None]


def measured_event(values: Mapping[str, Any]) -> Measured | None:
    """The event that `dataclasses.asdict` made these of, and maybe a later version; None where they are no event's."""
    for kind in (StepDone, Validated):
        own: dict[str, Any] = {field.name: values.get(field.name) for field in fields(kind)}
        if all(map(_is_number, own.values())):
            return kind(**own)
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
