"""A plain model folder, as `transformers` loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loratune.files import new_folder
from loratune.model.quiet import quietly


def save_plain(model: Any, tokenizer: Any, path: Path) -> None:
    """Write weights without any adapter, config and tokenizer; the folder appears complete or not at all."""
    plain = {name: tensor for name, tensor in model.state_dict().items() if ".lora." not in name}
    with quietly(), new_folder(path) as folder:
        model.save_pretrained(folder, state_dict=plain)
        tokenizer.save_pretrained(folder)
