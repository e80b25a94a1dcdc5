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
    examples = setup.prepared.examples_for_samples(setup.decisions["samples"])
    prompts, references = zip(*(render_prompt(example, setup.base.tokenizer) for example in examples), strict=True)
    stops = stop_ids(setup.model, setup.base.tokenizer)
    sampling = Sampling(max_new_tokens=max_new_tokens, seed=setup.decisions["seed"])
    tuned = generate(setup.model, setup.base.tokenizer, prompts, stops, sampling)
    with lora.disabled():
        base = generate(setup.model, setup.base.tokenizer, prompts, stops, sampling)
    return [
        {
            "place": str(example.place),
            "prompt": setup.base.tokenizer.decode(list(prompt)),
            "reference": reference,
            "base": before.text,
            "tuned": after.text,
        }
        for example, prompt, reference, before, after in zip(examples, prompts, references, base, tuned, strict=True)
    ]
