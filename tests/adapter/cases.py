"""Adapters that ours and peft's code both know how to make, and what their outputs are compared by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import loratune as lt
from tests.models import VOCABULARY, tiny

# Name → (family, settings that both `LoraConfig`s take).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "alpha is a fraction": ("llama", {"target_modules": ["q_proj"], "lora_alpha": 2.5}),
    "rslora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\..*\.v_proj": 7},
            "alpha_pattern": {r"layers\.0\.self_attn\.v_proj": 30, "up_proj": 1},
        },
    ),
    "patterns whose order matters": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"q_proj": 2, ".*proj": 6},
            "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 5, ".*": 40, "(q|v)_proj": 99},
        },
    ),
    "regex": ("llama", {"target_modules": r".*layers\.[01]\.(self_attn\.k_proj|mlp\.(up|down)_proj)"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "all but": ("llama", {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]}),
    "one layer": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    "one layer of a list": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    ),
    "all of one layer": ("llama", {"target_modules": "all-linear", "layers_to_transform": [0]}),
    "regex of one layer": ("llama", {"target_modules": r".*\.[qv]_proj", "layers_to_transform": [1]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    "gpt2 rslora": ("gpt2", {"target_modules": ["c_attn"], "use_rslora": True, "r": 3}),
    "gpt2 all-linear": ("gpt2", {"target_modules": "all-linear"}),
    "gpt2 one layer": ("gpt2", {"target_modules": ["attn.c_proj", "c_fc"], "layers_to_transform": [0]}),
    "gpt2 says it": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
}

# What peft itself cannot make, or cannot write so that it reads back the same (its file sorts the patterns).
OURS_ONLY = ("patterns whose order matters", "all of one layer", "regex of one layer")

IDS = torch.arange(2 * 7).view(2, 7) * 17 % VOCABULARY


def settings_of(case: str) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 8, **CASES[case][1]}


def base_of(case: str) -> Any:
    return tiny(CASES[case][0])


def randomise(model: nn.Module) -> None:
    """Give A and B values that move every logit; ours and peft's parameters alike."""
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(0.0, 0.3, generator=dice)


def ours(case: str) -> tuple[Any, lt.Adapters]:
    model = base_of(case)
    handle = lt.attach(model, lt.LoraConfig(**settings_of(case)))
    randomise(model)
    return model, handle


def theirs(case: str) -> Any:
    import warnings

    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base_of(case), peft.LoraConfig(**settings_of(case)))
    randomise(model)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model(IDS).logits
    assert isinstance(found, Tensor)
    return found


def gap(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())
