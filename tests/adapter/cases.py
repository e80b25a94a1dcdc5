"""Adapters that ours and peft's code both know how to make, and what their outputs are compared by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import loratune as lt
from tests.models import VOCABULARY, tiny

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

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
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "gpt2 dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "use_rslora": True}),
    "bias behind B": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "lora_bias": True, "use_rslora": True}),
    "biases of targets": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "every bias": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "every bias and one behind B": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "lora_bias": True}),
    "head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "norms": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "one norm": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"], "use_dora": True}),
    "a whole mlp": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp"]}),
    "every bias and a norm": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"], "bias": "all"}),
    "pissa": ("llama", {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"}),
    "gpt2 pissa": ("gpt2", {"target_modules": ["c_attn"], "init_lora_weights": "pissa", "use_rslora": True}),
    "pissa with dora": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "pissa", "use_dora": True}),
    "pissa with patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "up_proj"],
            "init_lora_weights": "pissa",
            "rank_pattern": {"up_proj": 3},
            "alpha_pattern": {"q_proj": 5},
        },
    ),
    "olora": ("llama", {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "olora", "lora_alpha": 4}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "embedding dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "scaled and tied embedding": ("gemma3", {"target_modules": ["embed_tokens", "q_proj"]}),
    "gpt2 embeddings": ("gpt2", {"target_modules": ["wte", "wpe", "c_attn"], "rank_pattern": {"wpe": 2}}),
    "experts": ("mixtral", {"target_modules": [], "target_parameters": EXPERTS}),
    "experts beside modules": (
        "qwen3_moe",
        {
            "target_modules": ["q_proj", "v_proj"],
            "target_parameters": EXPERTS,
            "rank_pattern": {"experts.down_proj": 2, "q_proj": 3},
            "alpha_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 20},
            "use_rslora": True,
        },
    ),
    "experts alone": ("gpt_oss", {"target_parameters": EXPERTS}),
    "experts stored (in, out)": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts that do not say it": (
        "llama4",
        {"target_modules": [], "target_parameters": ["feed_forward.experts.gate_up_proj", "experts.down_proj"]},
    ),
    "one parameter of experts": ("mixtral", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "experts of one layer": (
        "mixtral",
        {"target_modules": [], "target_parameters": ["model.layers.1.mlp.experts.gate_up_proj"]},
    ),
    "a router and experts": ("mixtral", {"target_modules": [], "target_parameters": ["gate.weight", *EXPERTS]}),
    "orthogonal": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
}

# What peft itself cannot make, or cannot write so that it reads back the same (its file sorts the patterns).
OURS_ONLY = ("patterns whose order matters", "all of one layer", "regex of one layer")

# Updates that count from a start: ours are written as plain ones of twice the rank, theirs as they are.
FROM_A_START = ("pissa", "gpt2 pissa", "pissa with dora", "pissa with patterns", "olora")

# What our file says in other words than theirs: to peft "norm" is every name that ends so, and a file names them all.
OTHER_WORDS = {"norms": {"modules_to_save"}} | {
    # None, or an empty list, which both mean no modules beside parameters, are the word that peft has for that.
    case: {"target_modules"}
    for case, (_, settings) in CASES.items()
    if not settings.get("target_modules")
}

# Where peft writes the biases inside its wrappers once more, or the table of a targeted embedding or head.
WITH_SURPLUS = (
    "every bias and a norm", "embedding", "embedding and head", "embedding dora", "scaled and tied embedding",
)  # fmt: skip

IDS = torch.arange(2 * 7).view(2, 7) * 17 % VOCABULARY


def settings_of(case: str) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 8, **CASES[case][1]}


def base_of(case: str) -> Any:
    return tiny(CASES[case][0])


def randomise(model: nn.Module) -> None:
    """Move all that trains until every logit has moved; ours and peft's parameters alike."""
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=dice) * 0.3)


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
