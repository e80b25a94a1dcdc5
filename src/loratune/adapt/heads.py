"""What a model is used for, and which of its modules are the heads of that use."""

from __future__ import annotations

from typing import cast

from torch import nn

from loratune.config import LoraConfig, tasks


def task_of_class(model: nn.Module) -> str | None:
    """The task that the name of the model's class tells."""
    return tasks.task_of_class(type(model).__name__)


def with_task(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The config with the task that the model's class tells, where it names none itself."""
    found = task_of_class(model)
    return config if config.task_type or not found else cast(LoraConfig, config.replace(task_type=found))


def new_heads(model: nn.Module, task: str | None) -> tuple[str, ...]:
    """Paths of the heads that the task added to the base; a fresh one holds random numbers, so it has to train."""
    return tuple(name for name in model._modules if tasks.is_head(name, task))
