"""What a run is for: the task that was asked for, or the one that the model and the rows are of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratune.adapter import SavedAdapter
from loratune.config import TrainConfig
from loratune.config.tasks import CAUSAL_LM, HEADS_OF_TASK
from loratune.data.example import Corpus
from loratune.data.read import read
from loratune.data.tasks import DATA_TASKS, OPEN, task_of_shape
from loratune.errors import ConfigError, ModelError
from loratune.model import (
    FEATURES,
    LANGUAGE_MODEL,
    Head,
    config_of,
    inside,
    is_loaded,
    names_of,
    task_of_loaded,
    usual_task,
)
from loratune.run.prepare import Rows


def choose_head(model: Any, rows: Rows, config: TrainConfig) -> tuple[Head, Rows]:
    """What the model is loaded as, and the rows, which have been read where their labels or columns decide it.

    Raises:
        ConfigError: the task is none that this model can be trained for, or a setting says nothing in it.
        DataError: rows that are of no such task.
    """
    told, name = _told(model)
    task = config.task_type or told
    if task == CAUSAL_LM:
        reason = "given" if config.task_type else "the model writes; what it learns is to go on"
        return replace(LANGUAGE_MODEL, reason=reason), rows
    if task is not None and task not in DATA_TASKS:
        known = ", ".join(DATA_TASKS)
        raise ModelError(f"{name} is for {task}, which is not trained here", hint=f"--task has {known}")
    shapes = DATA_TASKS[task].shapes if task else [s for open_ in OPEN for s in DATA_TASKS[open_].shapes]
    corpus = read(rows.data, columns=config.columns, shapes=shapes)
    reason = "given" if config.task_type else f"{name} is made for it" if told else f"{name} reads, rows {corpus.shape}"
    task = task or task_of_shape(corpus.shape)
    _refuse_meaningless(task, config)
    labels = _labels(task, corpus, model)
    return Head(task, labels, config.seed, reason), replace(rows, data=corpus)


def _told(model: Any) -> tuple[str | None, str]:
    """The task that the model is of, None where it may have several, and the name of its class."""
    if is_loaded(model):
        return task_of_loaded(model), type(model).__name__
    config = config_of(str(model))
    return usual_task(config), next(iter(config.architectures or ()), config.model_type)


def _labels(task: str, corpus: Corpus, model: Any) -> tuple[str, ...]:
    """The labels of the rows, as a model that was trained on them numbers them where it knows them all."""
    found = DATA_TASKS[task].labels(corpus)
    config = model.config if is_loaded(model) else config_of(str(model))
    known = names_of(config)
    return known if found and set(found) <= set(known) else found


def _refuse_meaningless(task: str, config: TrainConfig) -> None:
    names = [name for name in DATA_TASKS[task].meaningless if name in config.model_fields_set and getattr(config, name)]
    problems = [f"{name}={getattr(config, name)!r} says nothing for {task}: it is about next tokens" for name in names]
    if config.init_lora_weights == "eva" and task == FEATURES:
        problems.append("init='eva' would count pads: the texts of pairs go through the model in passes of their own")
    if problems:
        raise ConfigError(problems, hint="leave them out")


def next_command(head: Head, run: Path) -> str:
    """What to do with a run first."""
    return f"chat {run} --vs base" if head == LANGUAGE_MODEL else f"eval {run} --data FILE"


def saved_head(record: Mapping[str, Any] | None, saved: SavedAdapter) -> Head:
    """What the base of an adapter is loaded as: from the run's record, else from what the adapter's files tell."""
    if record is not None and "task" in record:
        found = record["task"]
        return Head(found["type"], tuple(found["labels"]), found["seed"])
    task = saved.config.task_type
    if task is None or task not in DATA_TASKS:
        return LANGUAGE_MODEL
    # PEFT's files have no names of labels: these are their numbers then, as many as the head gives.
    heads = [t for path, t in saved.replaced.items() if inside(path, HEADS_OF_TASK.get(task, ())) and "weight" in path]
    return Head(task, tuple(str(number) for number in range(len(heads[-1]) if heads else 0)))


def model_head(name: str) -> Head:
    """What a model without an adapter is loaded as: with the labels that its own config names."""
    config = config_of(name)
    task = usual_task(config)
    if task is None or task == CAUSAL_LM or task not in DATA_TASKS:
        return LANGUAGE_MODEL
    return Head(task, tuple(str(config.id2label[number]) for number in sorted(config.id2label)))


def refuse_other_tasks(model: str, config: TrainConfig, what: str) -> None:
    """Raise before anything is loaded where `what` could not be done with the model.

    Raises:
        ConfigError: it is trained to do something else than to write.
    """
    task = config.task_type or usual_task(config_of(model))
    if task != CAUSAL_LM:
        hint = f"`loratune train {model} DATA` measures the base beside what it trains"
        raise ConfigError(f"{what} is of models that write, and {model} is for {task or ' or '.join(OPEN)}", hint=hint)


def require_language_model(head: Head, what: str, instead: str) -> None:
    """Raise where the model chooses among labels, or answers otherwise than by writing.

    Raises:
        ConfigError: with what to use instead.
    """
    if head.task != CAUSAL_LM:
        raise ConfigError(f"{what} needs a model that writes, and this one is for {head.task}", hint=instead)
