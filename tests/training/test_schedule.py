"""The learning rate is a function of the step alone."""

from __future__ import annotations

import math

import pytest
import torch

from loratune.training.optimizer import make_optimizer, set_lr
from loratune.training.schedule import Schedule


def test_warmup_rises_evenly_and_never_starts_at_zero() -> None:
    schedule = Schedule("constant", 1.0, 100, 4)
    assert [schedule.lr(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_linear() -> None:
    schedule = Schedule("linear", 2.0, 10, 2)
    assert [schedule.lr(step) for step in range(2, 10)] == pytest.approx([2 * (8 - k) / 8 for k in range(8)])


def test_cosine() -> None:
    schedule = Schedule("cosine", 1.0, 12, 2)
    assert schedule.lr(2) == 1.0
    assert schedule.lr(7) == pytest.approx(0.5)
    assert schedule.lr(11) == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi)))


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (5, 4), (100, 5)])
def test_every_step_has_an_effect(kind: str, steps: int, warmup: int) -> None:
    rates = [Schedule(kind, 3e-4, steps, warmup).lr(step) for step in range(steps)]  # type: ignore[arg-type]
    assert all(0 < rate <= 3e-4 for rate in rates)
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_groups_keep_their_ratio() -> None:
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer("adamw", [{"params": [a], "lr": 1e-3}, {"params": [b], "lr": 16e-3}], 1e-3)
    for rate in (1e-3, 5e-4, 1e-4):
        set_lr(optimizer, rate, 1e-3)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate, 16 * rate])
