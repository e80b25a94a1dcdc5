"""One run of a comparison: trained, then measured on the same rows as all others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.data.example import Corpus
from loratune.engine import Sampling
from loratune.estimation import Shape, step_flops
from loratune.run.answer import evaluate, generate
from loratune.run.events import StepDone, Validated
from loratune.run.folder import RunFolder
from loratune.run.opened import Opened, open_run
from loratune.run.train import train

BASE = "base"
# Settings that decide which tokens of a row are scored.
_OF_DATA = ("loss", "max_length", "overlong", "columns")


@dataclass(frozen=True)
class Task:
    """What one run of a comparison is told.

    Attributes:
        method: as `--method` has it; "base" trains nothing and is measured only.
        folder: its run folder. settings: of `train`, but for the method.
        held_out: what it is validated on. answers: how many of these rows are answered too; 0 for none.
        elsewhere: texts outside the task.
    """

    model: str
    method: str
    train: Corpus
    held_out: Corpus
    folder: str
    settings: dict[str, Any]
    answers: int = 0
    elsewhere: tuple[str, ...] = ()


def contend(task: Task) -> dict[str, Any]:
    """Train and measure; the run folder stays."""
    if task.method == BASE:
        loading = {name: task.settings[name] for name in ("device", "dtype", "quant") if name in task.settings}
        opened = open_run(task.model, **loading)
        return {"quant": opened.base.quant} | _measured(task, opened)
    run = train(task.model, task.train, held_out=task.held_out, out=task.folder, method=task.method, **task.settings)
    record = run.record
    found = {
        "path": str(run.path),
        "quant": record["base"]["quant"],
        "lr": record["settings"]["lr"]["value"],
        "trainable": record["adapter"]["trainable"],
        "share": record["adapter"]["share"],
        "val_loss": record["result"]["val_loss"],
        "base_val_loss": record["result"]["base_val_loss"],
        "steps": record["result"]["steps"],
        "seconds": record["measured"]["seconds"],
        "peak_memory_bytes": record["measured"]["peak_memory_bytes"],
        "adapter_bytes": (run.path / "adapter_model.safetensors").stat().st_size,
    }
    if not (task.answers or task.elsewhere):
        return found
    opened = open_run(str(run.path), device=task.settings.get("device"))
    return found | {"curve": _curve(run.path, opened, record)} | _measured(task, opened)


def _measured(task: Task, opened: Opened) -> dict[str, Any]:
    """Answers to held-out rows, and the loss on texts outside the task."""
    found: dict[str, Any] = {}
    if task.method == BASE:
        told = {name: task.settings[name] for name in _OF_DATA if name in task.settings}
        found["val_loss"] = evaluate(opened, task.held_out, **told)["loss"]
    if task.elsewhere:
        rows = [{"text": text} for text in task.elsewhere]
        found["elsewhere_loss"] = evaluate(opened, rows, loss="all", overlong="truncate")["loss"]
    if task.answers:
        examples = task.held_out.examples[: task.answers]
        answers = generate(opened, examples, Sampling(max_new_tokens=128))
        exact = sum(answer["output"].strip() == str(answer["reference"]).strip() for answer in answers)
        found |= {"answered": len(answers), "exact_match": exact / len(answers), "answers": answers}
    return found


def _curve(folder: Path, opened: Opened, record: dict[str, Any]) -> list[dict[str, float]]:
    """After how many steps, tokens, operations and seconds of training each held-out loss was reached."""
    assert opened.lora is not None, "the run that was just finished has an adapter"
    plan, shape = opened.lora.plan(), Shape.of(opened.base.model)
    recompute = record["settings"]["recompute"]["value"] == "on"
    events = RunFolder(folder).metrics()
    reached = {event.step: event.val_loss for event in events if isinstance(event, Validated)}
    steps = {event.step: event for event in events if isinstance(event, StepDone)}
    done = {"tokens": 0, "flops": 0.0, "seconds": 0.0}
    points = [{"step": 0, "val_loss": reached[0], **done}]
    for step, event in sorted(steps.items()):
        done["tokens"] += event.tokens
        done["flops"] += step_flops(plan, shape, event.computed_tokens, event.supervised_tokens, recompute=recompute)
        done["seconds"] += event.step_seconds
        if step in reached:
            points.append({"step": step, "val_loss": reached[step], **done})
    return points
