"""What is decided where the user said nothing, and that what was given always holds."""

from __future__ import annotations

import math
from typing import Any

import pytest

from loratune.config import TrainConfig
from loratune.data.fit import Fit
from loratune.errors import ConfigError
from loratune.run.decide import (
    Decisions,
    decide_length,
    decide_training,
    decide_val,
    describe,
    learning_rate,
    lora_config,
    warmup_steps,
)


def fit_of(rows: int, supervised: int) -> Fit:
    return Fit(rows, 10 * supervised, supervised, 100, 50, 50.0, 4.0, 0)


def decided(
    rows: int = 100, supervised: int = 1000, *, per_rank: int = 1000, hidden: int = 576, **given: Any
) -> Decisions:
    decisions = Decisions(TrainConfig(**given))
    decide_training(decisions, fit_of(rows, supervised), hidden, per_rank)
    return decisions


def test_given_values_hold() -> None:
    given = {"r": 3, "lora_alpha": 7.0, "lora_dropout": 0.3, "lr": 0.5, "epochs": 2.0, "use_rslora": True}
    decisions = decided(**given)
    for name, value in given.items():
        assert decisions[name] == value
        assert decisions.reasons[name] == "given"


@pytest.mark.parametrize(
    ("rows", "epochs", "steps"),
    [(80, 3, 30), (8 * 40, 3, 120), (8 * 70, 2, 140), (8 * 100, 1, 100), (8 * 1000, 1, 1000), (81, 3, 33)],
)
def test_about_a_hundred_steps(rows: int, epochs: int, steps: int) -> None:
    decisions = decided(rows)
    assert (decisions["epochs"], decisions["max_steps"]) == (epochs, steps)
    assert str(rows) in decisions.reasons["epochs"]


def test_steps_decide_the_epochs() -> None:
    decisions = decided(80, max_steps=25)
    assert (decisions["max_steps"], decisions["epochs"]) == (25, 2.5)


def test_epochs_that_are_no_whole_number() -> None:
    assert decided(80, epochs=0.25)["max_steps"] == 3


@pytest.mark.parametrize(("supervised", "r"), [(1000, 16), (32_000, 16), (32_001, 32), (64_001, 64), (10**9, 256)])
def test_rank_holds_the_data(supervised: int, r: int) -> None:
    decisions = decided(supervised=supervised, per_rank=1000)
    assert decisions["r"] == r
    assert decisions["lora_alpha"] == 2 * r
    assert f"{supervised:,} supervised tokens" in decisions.reasons["r"]


def test_dropout_for_small_data_seen_twice() -> None:
    assert decided(100, epochs=3.0)["lora_dropout"] == 0.05
    assert decided(100, epochs=1.0)["lora_dropout"] == 0.0
    assert decided(100, supervised=600_000, epochs=3.0)["lora_dropout"] == 0.0


def test_learning_rate_falls_with_the_width() -> None:
    assert learning_rate(2000)[0] == pytest.approx(5e-4)
    assert learning_rate(576)[0] == 0.0013
    assert learning_rate(4096)[0] < learning_rate(2048)[0]
    plain, rs = decided(), decided(use_rslora=True)
    assert rs["lr"] == pytest.approx(plain["lr"] / math.sqrt(16), rel=0.05)


def test_adapter_of_the_decisions() -> None:
    config = lora_config(decided(r=4, target_modules=("q_proj",), method="rslora"))
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 8, True)
    assert config.target_modules == ("q_proj",)


@pytest.mark.parametrize(("rows", "val"), [(5, 0), (19, 0), (20, 2), (1000, 100), (10_000, 200)])
def test_held_out_rows(rows: int, val: int) -> None:
    decisions = Decisions(TrainConfig())
    assert decide_val(decisions, rows) == val
    assert decisions.reasons["val"]


def test_given_validation_holds() -> None:
    assert decide_val(Decisions(TrainConfig(val=0)), 1000) == 0
    assert decide_val(Decisions(TrainConfig(val=0.5)), 1000) == 0.5


def test_length() -> None:
    assert decide_length(Decisions(TrainConfig()), 2048) == 2048
    assert decide_length(Decisions(TrainConfig()), None) == 4096
    assert decide_length(Decisions(TrainConfig(max_length=64)), 2048) == 64
    with pytest.raises(ConfigError, match="exceeds the model's context of 32"):
        decide_length(Decisions(TrainConfig(max_length=64)), 32)


@pytest.mark.parametrize(
    ("warmup", "steps", "count"), [(0.05, 100, 5), (0, 100, 0), (10, 100, 10), (10, 4, 3), (0.5, 1, 0)]
)
def test_warmup(warmup: float, steps: int, count: int) -> None:
    assert warmup_steps(warmup, steps) == count


def test_description_names_what_was_decided_only() -> None:
    lines = describe(decided(r=5, hidden=64).to_json())
    assert not [line for line in lines if line.startswith(("r =", "batch_size"))]
    assert "lora_alpha = 10: twice the rank" in lines
