"""The model card beside an adapter: front matter that hubs read, and what a person needs to use it."""

from __future__ import annotations

import yaml

from loratune.adapter.value import SavedAdapter


def card_of(adapter: SavedAdapter, *, about: str = "") -> str:
    """The text of `README.md`; `about` is Markdown that a run adds (its data, results)."""
    front = {
        "library_name": "peft",
        "tags": sorted(["lora", "transformers", *([f"base_model:adapter:{adapter.base}"] if adapter.base else [])]),
    }
    if adapter.base:
        front["base_model"] = adapter.base
    if adapter.config.task_type in (None, "CAUSAL_LM"):
        front["pipeline_tag"] = "text-generation"
    config = adapter.config
    targets = sorted({path.rpartition(".")[2] for path in adapter.factors})
    base = f"`{adapter.base}`" if adapter.base else "its base model"
    lines = [
        f"# A LoRA adapter for {base}",
        "",
        f"Rank {config.r}, alpha {config.lora_alpha:g}, {len(adapter.factors)} modules ({', '.join(targets)}).",
        "",
        *([about.strip(), ""] if about.strip() else []),
        "```python",
        "import loratune as lt",
        "",
        'lora = lt.attach(model, "path/to/this/folder")',
        "```",
        "",
        "The folder is in PEFT's format; `peft` reads it as it is.",
        "",
    ]
    return f"---\n{yaml.safe_dump(front, sort_keys=True)}---\n\n" + "\n".join(lines)
