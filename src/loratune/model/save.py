"""A plain model folder, as `transformers` loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from loratune.files import new_folder
from loratune.model.quiet import quietly


def save_plain(model: Any, state: dict[str, Tensor], tokenizer: Any, path: Path) -> None:
    """Write `state`, the model's config and the tokenizer; the folder appears complete or not at all."""
    with quietly(), new_folder(path) as folder:
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
