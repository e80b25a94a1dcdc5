"""Trackers: refused before a run starts, and told what happens in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState

from loratune.errors import ConfigError, MissingExtraError
from loratune.training import trackers
from loratune.training.events import Noticed, StepDone, Validated

STEP = StepDone(3, 1.5, 1e-3, 0.7, 100, 90, 40, 4, 0.1, 10**8)


def test_no_trackers_need_nothing() -> None:
    trackers.check_trackers(())


def test_all_unknown_trackers_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        trackers.check_trackers(["wandbd", "comet"])
    assert "'wandbd'; did you mean 'wandb'?" in str(caught.value)
    assert "'comet'" in str(caught.value)
    assert "tensorboard, wandb, mlflow, trackio" in caught.value.hint


def test_all_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError) as caught:
        trackers.check_trackers(["mlflow", "tensorboard"])
    assert caught.value.hint == "pip install mlflow tensorboard"
    assert len(caught.value.problems) == 2


def test_listener_passes_on() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.started: Any = None
            self.logged: list[Any] = []

        def init_trackers(self, name: str, config: Any) -> None:
            self.started = (name, config)

        def log(self, values: Any, step: int) -> None:
            self.logged.append((step, values))

    recorder = Recorder()
    listen = trackers.tracker_listener(recorder, "brave-otter", {"r": 8, "targets": ("q_proj",), "val": None})  # type: ignore[arg-type]
    for event in (STEP, Validated(3, 1.25), Noticed(3, "early stop", "…")):
        listen(event)
    assert recorder.started == ("brave-otter", {"r": 8, "targets": "('q_proj',)", "val": "None"})
    assert recorder.logged == [(3, {"loss": 1.5, "lr": 1e-3, "grad_norm": 0.7}), (3, {"val_loss": 1.25})]


def test_accelerator_keeps_the_dtype(tmp_path: Path) -> None:
    accelerator = trackers.make_accelerator(torch.device("cpu"), (), tmp_path)
    assert accelerator.mixed_precision == "no"
    assert accelerator.device.type == "cpu"


def test_after_a_run_on_another_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate has one state for a process, and refuses `cpu=True` where that is a GPU's."""
    trackers.make_accelerator(torch.device("cpu"), (), tmp_path)
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("cuda"))
    monkeypatch.setitem(AcceleratorState._shared_state, "device", torch.device("cuda"))
    with pytest.raises(ValueError, match="already been initialized"):
        Accelerator(cpu=True)
    assert trackers.make_accelerator(torch.device("cpu"), (), tmp_path).mixed_precision == "no"


def test_mixed_precision_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackers.make_accelerator(torch.device("cpu"), (), tmp_path)
    monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "bf16")
    with pytest.raises(ConfigError, match=r"set up for mixed precision \(bf16\) in this process"):
        trackers.make_accelerator(torch.device("cpu"), (), tmp_path)
