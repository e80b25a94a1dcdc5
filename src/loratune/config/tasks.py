"""What a model is used for: the names that PEFT gives to tasks, and what the name of a model's class tells of them."""

from __future__ import annotations

from typing import Literal

TaskType = Literal["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
CAUSAL_LM: TaskType = "CAUSAL_LM"

# The heads that a task adds to a base: peft trains and saves them whole, whatever `modules_to_save` says.
HEADS_OF_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_TASK_OF_CLASS: dict[str, TaskType] = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def task_of_class(name: str) -> TaskType | None:
    """The task that the name of a model's class tells."""
    return next((task for ending, task in _TASK_OF_CLASS.items() if name.endswith(ending)), None)


def is_head(name: str, task: str | None) -> bool:
    """Whether a child of the model is a head of the task: by the end of its name, as peft compares names.

    So is the layer before it that DistilBERT calls `pre_classifier`.
    """
    return name.endswith(HEADS_OF_TASK.get(task or "", ()))
