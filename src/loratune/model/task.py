"""What a base is loaded as: the class of its task, and the head that it gets where its files have none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from loratune.config.tasks import CAUSAL_LM, HEADS_OF_TASK, is_head, task_of_class
from loratune.errors import ConfigError, ModelError

# The class that a base is loaded with.
_AUTO: Mapping[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": AutoModel,
}

# Heads of a fixed size are made by the number of labels, too: here the beginning and the end of an answer.
_CONFIG: Mapping[str, dict[str, Any]] = {"QUESTION_ANS": {"num_labels": 2}}


@dataclass(frozen=True, slots=True)
class Head:
    """What a base is loaded as.

    Attributes:
        task: as PEFT calls it. labels: what its head chooses among, by number; none where it has no labels.
        seed: of the numbers that a new head starts from.
        reason: why this task.
    """

    task: str = CAUSAL_LM
    labels: tuple[str, ...] = ()
    seed: int = 0
    reason: str = field(default="the model's own", compare=False)

    @property
    def auto(self) -> Any:
        return _AUTO[self.task]

    def config(self) -> dict[str, Any]:
        """What the model's config says of its labels."""
        if not self.labels:
            return _CONFIG.get(self.task, {})
        return {"id2label": dict(enumerate(self.labels)), "label2id": {name: i for i, name in enumerate(self.labels)}}


LANGUAGE_MODEL = Head()


# The task of a bare model, whose vectors are what it is for.
FEATURES = "FEATURE_EXTRACTION"


def usual_task(config: Any) -> str | None:
    """The task of a model by its config; None for an encoder without a head, which can be given one.

    What is no encoder and tells nothing is taken for a causal LM.
    """
    for name in config.architectures or ():
        if (task := task_of_class(name)) is not None and (task != "SEQ_2_SEQ_LM" or config.is_encoder_decoder):
            return task
    encodes = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder
    return None if encodes else CAUSAL_LM


def task_of_loaded(model: PreTrainedModel) -> str:
    """The task of a model's class; what neither tells one nor is bare is taken for a causal LM."""
    return task_of_class(type(model).__name__) or (FEATURES if model.base_model is model else CAUSAL_LM)


def names_of(config: Any) -> tuple[str, ...]:
    """The labels that a model's config has names for; none where it only counts them."""
    found = getattr(config, "id2label", None) or {}
    names = tuple(str(found[number]) for number in sorted(found))
    return () if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


def fresh_modules(model: PreTrainedModel, missing: Iterable[str], task: str) -> tuple[str, ...]:
    """Paths of the modules that a task has added to a base: its head, and what stands before that.

    The head is always one, so that a base is the same with any head; another where the files lack all of it. What
    belongs to the base itself never is: without a layer its files are incomplete.
    """
    if task not in (*HEADS_OF_TASK, FEATURES):
        return ()
    lacking, trunk = set(missing), f"{model.base_model_prefix}." if task in HEADS_OF_TASK else ""
    found = [name for name in model._modules if is_head(name, task)]
    for path, module in model.named_modules():
        names = {f"{path}.{name}" for name, _ in module.named_parameters()}
        added = bool(path) and (not f"{path}.".startswith(trunk) or path.rpartition(".")[2] == "pooler")
        if added and names and names <= lacking and not inside(path, found):
            found.append(path)
    return tuple(found)


def inside(path: str, roots: Iterable[str]) -> bool:
    """Whether a parameter's or module's name stands in one of these modules."""
    return any(path == root or path.startswith(root + ".") for root in roots)


def refuse_loaded(model: PreTrainedModel, head: Head) -> None:
    """A loaded model is somebody's: it gets no new head.

    Raises:
        ConfigError: it has not the head that the task needs, or one for other labels.
    """
    name = type(model).__name__
    if head != LANGUAGE_MODEL and task_of_loaded(model) != head.task:
        hint = f"load it with {head.auto.__name__}, or name it instead of loading it"
        raise ConfigError(f"task={head.task!r}: the loaded {name} has no head for it", hint=hint)
    problems = []
    known = names_of(model.config)
    if head.labels and len(head.labels) != model.config.num_labels:
        problems.append(f"the loaded {name} tells {model.config.num_labels} labels apart, the rows {len(head.labels)}")
    elif head.labels and known and known != head.labels:
        problems.append(f"the loaded {name} has the labels {', '.join(known)}, the rows {', '.join(head.labels)}")
    if head.labels and model.config.pad_token_id is None:
        problems.append(f"the config of the loaded {name} has no pad_token_id, so that rows cannot be padded")
    if problems:
        raise ConfigError(problems, hint="load it with num_labels, id2label and pad_token_id, or name it")


def is_loaded(model: Any) -> bool:
    """Whether it is a model, and not the name of one.

    Raises:
        ModelError: it is neither.
    """
    if isinstance(model, str | os.PathLike):
        return False
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"a {type(model).__name__} is no model", hint="name one, or load it with transformers")
    return True
