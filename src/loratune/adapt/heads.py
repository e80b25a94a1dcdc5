"""What a model is used for, and which of its modules are the heads of that use."""

from __future__ import annotations

from typing import cast

from torch import nn

from loratune.adapter.keys import HEADS_OF_TASK
from loratune.config import LoraConfig

_TASK_OF_CLASS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def task_of_class(model: nn.Module) -> str | None:
    """The task that the name of the model's class tells."""
    name = type(model).__name__
    return next((task for ending, task in _TASK_OF_CLASS.items() if name.endswith(ending)), None)


def with_task(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The config with the task that the model's class tells, where it names none itself."""
    found = task_of_class(model)
    return config if config.task_type or not found else cast(LoraConfig, config.replace(task_type=found))


def new_heads(model: nn.Module, task: str | None) -> tuple[str, ...]:
    """Paths of the heads that the task added to the base; a fresh one holds random numbers, so it has to train."""
    return tuple(name for name in HEADS_OF_TASK.get(task or "", ()) if name in model._modules)
