"""The model card beside an adapter: front matter that hubs read, and what a person needs to use it."""

from __future__ import annotations

import re
from typing import Any

import yaml

from loratune.adapter.value import SavedAdapter
from loratune.config.methods import CALLED, IA3, LORA, VERA
from loratune.config.tasks import CAUSAL_LM

_SIZE = re.compile(r"^(Rank \d+, alpha |VeRA of rank |\(IA\)³, ).*\.\n\n", re.MULTILINE)
# What the hub calls the tasks.
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "sentence-similarity",
}
# What the hub calls the methods.
_TAGS = {LORA: "lora", VERA: "vera", IA3: "ia3"}
_USE = "```python\nimport loratune as lt\n"


def card_of(adapter: SavedAdapter, *, about: str = "") -> str:
    """The text of `README.md`; `about` is Markdown that a run adds (its data, results), else the adapter's own."""
    about = (about or adapter.about).strip()
    of_base = [f"base_model:adapter:{adapter.base}"] if adapter.base else []
    tags = sorted([_TAGS[adapter.config.peft_type], "transformers", *of_base])
    front: dict[str, Any] = {"library_name": "peft", "tags": tags}
    if adapter.base:
        front["base_model"] = adapter.base
    pipeline = _PIPELINES.get(adapter.config.task_type or CAUSAL_LM)
    if pipeline:
        front["pipeline_tag"] = pipeline
    config = adapter.config
    adapted = [path for path in adapter.modules if path not in adapter.factors or adapter.factors[path].stack is None]
    targets = sorted({path.rpartition(".")[2] for path in (*adapted, *(config.target_parameters or ()))})
    kind = CALLED[config.peft_type]
    size = {
        LORA: f"Rank {config.r}, alpha {config.lora_alpha:g}",
        VERA: f"VeRA of rank {config.r}",
    }.get(config.peft_type, kind)
    base = f"`{adapter.base}`" if adapter.base else "its base model"
    lines = [
        f"# A {kind} adapter for {base}",
        "",
        f"{size}, {len(adapter.modules)} modules ({', '.join(targets)}).",
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
    rank = _SIZE.search(card)
    end = card.rfind(_USE)
    return card[rank.end() : end].strip() if rank and rank.end() <= end else ""
