"""The trackers that accelerate knows."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized

from loratune.errors import ConfigError, MissingExtraError, nearest
from loratune.training.events import Event, Listener, StepDone, Validated

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}


def check_trackers(names: Sequence[str]) -> None:
    """Raise before anything starts if a tracker is unknown or its package is not installed.

    Raises:
        ConfigError: no such tracker. MissingExtraError: its package is missing.
    """
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        problems = [f"log_with: no tracker {name!r}{nearest(name, list(TRACKERS))}" for name in unknown]
        raise ConfigError(problems, hint=f"there are {', '.join(TRACKERS)}")
    missing = [name for name in names if find_spec(TRACKERS[name]) is None]
    if missing:
        packages = " ".join(TRACKERS[name] for name in missing)
        raise MissingExtraError([f"log_with: {n} is not installed" for n in missing], hint=f"pip install {packages}")


def make_accelerator(device: torch.device, trackers: Sequence[str], folder: Path) -> Accelerator:
    """accelerate on the chosen device, without mixed precision: dtypes are our own matter.

    Raises:
        ConfigError: this process has set accelerate up with mixed precision.
    """
    # One state for the process: where a run on a GPU was before this one it is that one's, which nothing here minds,
    # since models and rows are put on their device without it.
    first = not is_initialized()
    if not first and AcceleratorState().mixed_precision != "no":
        raise ConfigError(
            f"accelerate is set up for mixed precision ({AcceleratorState().mixed_precision}) in this process, and a "
            "run has dtypes of its own",
            hint="train in a process of its own, or with Accelerator(mixed_precision='no') before",
        )
    cpu = first and device.type == "cpu"
    return Accelerator(cpu=cpu, mixed_precision="no", log_with=list(trackers) or None, project_dir=str(folder))


def tracker_listener(accelerator: Accelerator, name: str, settings: dict[str, Any]) -> Listener:
    """Passes steps and validations on to accelerate's trackers."""
    plain = (int, float, str, bool)
    flat = {key: value if isinstance(value, plain) else str(value) for key, value in settings.items()}
    accelerator.init_trackers(name, config=flat)

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            accelerator.log({"loss": event.loss, "lr": event.lr, "grad_norm": event.grad_norm}, step=event.step)
        elif isinstance(event, Validated):
            accelerator.log({"val_loss": event.val_loss}, step=event.step)

    return listen
