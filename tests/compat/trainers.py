"""What the tests of transformers' Trainer train on, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from tests.models import VOCABULARY


def data(rows: int = 8) -> list[dict[str, torch.Tensor]]:
    dice = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (rows, 6), generator=dice)
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    return TrainingArguments(**common(folder, **settings))


def common(folder: Path, **settings: Any) -> dict[str, Any]:
    """What trainers of all kinds are told here."""
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
        **settings,
    }


def losses(trainer: Trainer) -> list[float]:
    """Of each step that it logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
