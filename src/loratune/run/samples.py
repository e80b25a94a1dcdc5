"""Answers of base and tuned model to the same prompts, kept beside a run."""

from __future__ import annotations

from typing import Any

from loratune.adapt import Adapters
from loratune.data.render import render_prompt
from loratune.engine import Sampling, generate
from loratune.model import stop_ids
from loratune.run.setup import Setup


def take_samples(setup: Setup, lora: Adapters, *, max_new_tokens: int = 128) -> list[dict[str, Any]]:
    """Greedy answers to the first held-out prompts, with the adapter and without."""
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
