"""The model card beside an adapter: front matter that hubs read, and what a person needs to use it."""

from __future__ import annotations

import re

import yaml

from loratune.adapter.value import SavedAdapter
from loratune.config.tasks import CAUSAL_LM

_RANK = re.compile(r"^Rank \d+, alpha .*\.\n\n", re.MULTILINE)
# What the hub calls the tasks.
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "TOKEN_CLS": "token-classification",
    "FEATURE_EXTRACTION": "sentence-similarity",
}
_USE = "```python\nimport loratune as lt\n"


def card_of(adapter: SavedAdapter, *, about: str = "") -> str:
    """The text of `README.md`; `about` is Markdown that a run adds (its data, results), else the adapter's own."""
    about = (about or adapter.about).strip()
    front = {
        "library_name": "peft",
        "tags": sorted(["lora", "transformers", *([f"base_model:adapter:{adapter.base}"] if adapter.base else [])]),
    }
    if adapter.base:
        front["base_model"] = adapter.base
    pipeline = _PIPELINES.get(adapter.config.task_type or CAUSAL_LM)
    if pipeline:
        front["pipeline_tag"] = pipeline
    config = adapter.config
    adapted = [path for path, factors in adapter.factors.items() if factors.stack is None]
    targets = sorted({path.rpartition(".")[2] for path in (*adapted, *(config.target_parameters or ()))})
    base = f"`{adapter.base}`" if adapter.base else "its base model"
    lines = [
        f"# A LoRA adapter for {base}",
        "",
        f"Rank {config.r}, alpha {config.lora_alpha:g}, {len(adapter.factors)} modules ({', '.join(targets)}).",
        "",
        *([about, ""] if about else []),
        _USE,
        'lora = lt.attach(model, "path/to/this/folder")',
        "```",
        "",
        "The folder is in PEFT's format; `peft` reads it as it is.",
        "",
    ]
    return f"---\n{yaml.safe_dump(front, sort_keys=True)}---\n\n" + "\n".join(lines)


def about_of(card: str) -> str:
    """The Markdown that `card_of` was given about the adapter; nothing for a card that it did not write."""
    rank = _RANK.search(card)
    end = card.rfind(_USE)
    return card[rank.end() : end].strip() if rank and rank.end() <= end else ""
