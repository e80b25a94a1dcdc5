"""What a model is used for, and which of its modules are the heads of that use."""

from __future__ import annotations

from typing import cast

from torch import nn

from loratune.config import LoraConfig, tasks

# Classes whose heads are new to the base, and for whose use peft has no name.
_CLASSIFIES = ("ForImageClassification", "ForAudioClassification", "ForVideoClassification")


def task_of_class(model: nn.Module) -> str | None:
    """The task that the name of the model's class tells."""
    found = tasks.task_of_class(type(model).__name__)
    # Speech and images come in under other names, with which peft's wrapper for this task does not work.
    return None if found == "SEQ_2_SEQ_LM" and not _from_text_to_text(model) else found


def _from_text_to_text(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and getattr(model, "main_input_name", "") == "input_ids"


def with_task(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The config with the task that the model's class tells, where it names none itself."""
    found = task_of_class(model)
    return config if config.task_type or not found else cast(LoraConfig, config.replace(task_type=found))


def new_heads(model: nn.Module, task: str | None) -> tuple[str, ...]:
    """Paths of the heads that the task added to the base; a fresh one holds random numbers, so it has to train."""
    return tuple(name for name in model._modules if tasks.is_head(name, task))


def unnamed_heads(model: nn.Module) -> tuple[str, ...]:
    """Paths of heads that are new to the base though no task says so: those of images, sounds and videos."""
    return ("classifier",) if type(model).__name__.endswith(_CLASSIFIES) and "classifier" in model._modules else ()
