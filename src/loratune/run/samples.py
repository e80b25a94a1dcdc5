"""Answers of base and tuned model to the same prompts or rows, kept beside a run, and how good they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loratune.adapt import Adapters
from loratune.data.example import Place
from loratune.data.render import render_prompt
from loratune.engine import Sampling, generate
from loratune.evaluation import MEASURES, Asking, Measure
from loratune.model import Base, stop_ids
from loratune.run.setup import Setup

# Tokens of the rows that a model is asked about together.
_AT_ONCE = 2048


def take_samples(setup: Setup, lora: Adapters, *, max_new_tokens: int = 128) -> list[dict[str, Any]]:
    """Answers to the first held-out prompts or rows, with the adapter and without; greedy where they are written."""
    measure = MEASURES.get(setup.base.head.task)
    return _written(setup, lora, max_new_tokens) if measure is None else _told(setup, lora, measure)


def measure_both(setup: Setup, lora: Adapters) -> dict[str, dict[str, float]]:
    """The task's metrics on the held-out rows, of the base and of the tuned model; nothing where it has none."""
    measure, val = MEASURES.get(setup.base.head.task), setup.prepared.val
    if measure is None or val is None:
        return {}
    with lora.disabled():
        base = measure.metrics(setup.model, val.rows, asking_of(setup.base))
    return {"base": base, "tuned": measure.metrics(setup.model, val.rows, asking_of(setup.base))}


def metrics_line(metrics: dict[str, dict[str, float]]) -> str:
    """All metrics in one line, the base's in brackets."""
    base = metrics["base"]
    return " · ".join(f"{name} {value:.3f} (base {base[name]:.3f})" for name, value in metrics["tuned"].items())


def asking_of(base: Base) -> Asking:
    """How a base is asked about rows."""

    def decode(ids: Sequence[int]) -> str:
        return str(base.tokenizer.decode(list(ids), skip_special_tokens=True))

    return Asking(base.device, base.pad_id, _AT_ONCE, base.head.labels, decode)


def _told(setup: Setup, lora: Adapters, measure: Measure) -> list[dict[str, Any]]:
    rows, count = (setup.prepared.val or setup.prepared.train).rows, setup.decisions["samples"]
    asking = asking_of(setup.base)
    tuned = measure.ask(setup.model, rows, asking)
    with lora.disabled():
        base = measure.ask(setup.model, rows, asking)
    first: dict[Place, int] = {}  # of what became of a row of the data: all of it has one answer
    for number, row in enumerate(rows):
        first.setdefault(row.place, number)
    return [
        {
            "place": str(place),
            "prompt": asking.decode(rows[number].asked),
            "reference": measure.reference(rows[number], asking),
            "base": measure.words(base[number], rows, asking),
            "tuned": measure.words(tuned[number], rows, asking),
        }
        for place, number in list(first.items())[:count]
    ]


def _written(setup: Setup, lora: Adapters, max_new_tokens: int) -> list[dict[str, Any]]:
    chosen = _prompts(setup)
    prompts = [prompt for _, prompt, _ in chosen]
    stops = stop_ids(setup.model, setup.base.tokenizer)
    sampling = Sampling(max_new_tokens=max_new_tokens, seed=setup.decisions["seed"])
    tuned = generate(setup.model, setup.base.tokenizer, prompts, stops, sampling)
    with lora.disabled():
        base = generate(setup.model, setup.base.tokenizer, prompts, stops, sampling)
    return [
        {
            "place": place,
            "prompt": setup.base.tokenizer.decode(list(prompt)),
            "reference": reference,
            "base": before.text,
            "tuned": after.text,
        }
        for (place, prompt, reference), before, after in zip(chosen, base, tuned, strict=True)
    ]


def _prompts(setup: Setup) -> list[tuple[str, tuple[int, ...], str]]:
    """(place, prompt, reference) of the first rows whose prompt leaves room for an answer."""
    chosen: list[tuple[str, tuple[int, ...], str]] = []
    for example in setup.prepared.unseen:
        if len(chosen) == setup.decisions["samples"]:
            break
        prompt, reference = render_prompt(example, setup.base.tokenizer)
        if len(prompt) < setup.decisions["max_length"]:
            chosen.append((str(example.place), prompt, reference))
    return chosen
