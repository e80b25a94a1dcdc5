"""One script, run with peft and with `loratune.compat.peft` in its place."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch

from tests.adapter.cases import IDS, randomise
from tests.models import tiny

LIBRARIES = ("peft", "loratune.compat.peft")


def run(script: str, library: str, **names: Any) -> SimpleNamespace:
    """What the script printed, and the variables it left."""
    changed = script.replace("from peft import", f"from {library} import")
    variables: dict[str, Any] = {"tiny": tiny, "torch": torch, "IDS": IDS, "randomise": randomise, **names}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(changed, f"<script for {library}>", "exec"), variables)
    return SimpleNamespace(printed=printed.getvalue(), **variables)


def both(script: str, **names: Any) -> tuple[SimpleNamespace, SimpleNamespace]:
    """The script's results with peft, and with ours."""
    theirs, ours = (run(script, library, **names) for library in LIBRARIES)
    return theirs, ours


def adapter(folder: Path, *, family: str = "gpt2", seed: int = 1, **settings: Any) -> Path:
    """An adapter that matters, written by peft itself."""
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    config = peft.LoraConfig(**{"r": 4, "target_modules": targets, "task_type": "CAUSAL_LM", **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny(family), config)
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3, generator=dice)
    model.save_pretrained(str(folder))
    return folder
