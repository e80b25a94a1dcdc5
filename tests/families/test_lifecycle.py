"""An adapter's whole life on every family: attached, trained, saved, loaded, merged, detached (BEHAVIOUR 8 to 31)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loratune as lt
from tests.adapt.model import bits, picture
from tests.models import VOCABULARY, tiny

TARGETS = {
    "gpt2": ("c_attn", "c_proj"),
    "llama": ("q_proj", "down_proj"),
    "qwen3": ("k_proj", "up_proj"),
    "gemma3": ("o_proj", "gate_proj"),
    "phi3": ("qkv_proj", "gate_up_proj"),
    "mixtral": ("q_proj", "v_proj"),
}

# Kind → (settings, which of the base's tensors the adapter then has its own of).
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, ""),
    "all-linear": ({"target_modules": "all-linear"}, ""),
    "rslora": ({"use_rslora": True}, ""),
    "patterns": ({"rank_pattern": {"(qkv|gate|q)_.*": 2}, "alpha_pattern": {r"(h|layers)\.1\..*": 3}}, ""),
    "dora": ({"use_dora": True}, ""),
    "bias behind B": ({"lora_bias": True}, ""),
    "biases of targets": ({"bias": "lora_only"}, r".*\.(c_attn|c_proj)\.bias"),
    "every bias": ({"bias": "all"}, r".*\.bias"),
    "norm trained whole": ({"modules_to_save": ["norm"]}, r"model\.norm\.weight"),
    "ln_f trained whole": ({"modules_to_save": ["ln_f"], "use_dora": True}, r"transformer\.ln_f\.(weight|bias)"),
    "head trained whole": ({"modules_to_save": ["lm_head"]}, r"lm_head\.weight"),
    "router trained whole": ({"modules_to_save": ["gate"]}, r".*\.mlp\.gate\.weight"),
    "pissa": ({"init_lora_weights": "pissa"}, ""),
    "pissa with dora": ({"init_lora_weights": "pissa", "use_dora": True}, ""),
    "olora": ({"init_lora_weights": "olora"}, ""),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, ""),
    "swapped": ({"init_lora_weights": "swapped"}, ""),
}

CASES: dict[str, tuple[str, ...]] = {
    "gpt2": ("plain", "dora", "bias behind B", "biases of targets", "every bias", "ln_f trained whole", "pissa"),
    "llama": ("all-linear", "rslora", "dora", "head trained whole", "olora", "swapped"),
    "qwen3": ("plain", "norm trained whole", "orthogonal", "pissa with dora"),
    "gemma3": ("all-linear", "patterns", "norm trained whole", "dora"),
    "phi3": ("plain", "dora", "pissa", "patterns"),
    "mixtral": ("rslora", "router trained whole", "swapped"),
}

IDS = torch.arange(2 * 6).view(2, 6) * 17 % VOCABULARY


def config_of(family: str, kind: str) -> lt.LoraConfig:
    return lt.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS[family], **KINDS[kind][0]})


def base_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """The user's base: most of it trains, somebody froze the embedding."""
    model = tiny(family).to(dtype).requires_grad_(True)
    model.get_input_embeddings().requires_grad_(False)
    return model


def output(model: Any) -> Tensor:
    with torch.no_grad():
        found = model(IDS).logits
    assert isinstance(found, Tensor)
    return found


def gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def attributes(model: nn.Module) -> dict[str, tuple[set[str], list[str]]]:
    return {path: (set(vars(module)), list(module._modules)) for path, module in model.named_modules()}


def train(model: Any, handle: lt.Adapters, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.02, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.eval()


def train_only_the_adapter(model: Any, handle: lt.Adapters, base: dict[str, nn.Parameter]) -> None:
    """Every tensor of the adapter moves, and nothing else; the base never has a gradient."""
    frozen = {name: bits(parameter) for name, parameter in base.items()}
    started = {id(p): bits(p) for p in handle.parameters()}
    theirs = {id(p) for p in base.values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == started.keys()
    assert {id(p) for p in model.parameters()} == started.keys() | theirs
    train(model, handle)
    assert {name: bits(parameter) for name, parameter in base.items()} == frozen
    assert all(parameter.grad is None for parameter in base.values())
    assert all(bits(p) != started[id(p)] for p in handle.parameters())


def merge_and_return(model: Any, handle: lt.Adapters, unmerged: Tensor) -> None:
    before = picture(model, handle)
    handle.merge()
    assert gap(output(model), unmerged) < 1e-5
    handle.unmerge()
    assert picture(model, handle) == before


def merge_in_bf16(family: str, folder: Path) -> None:
    model = base_of(family, torch.bfloat16)
    handle = lt.attach(model, folder)
    before = picture(model, handle)
    for _ in range(3):
        handle.merge()
        assert picture(model)["tensors"] != before["tensors"]
        handle.unmerge()
    assert picture(model, handle) == before


@pytest.mark.parametrize(("family", "kind"), [(family, kind) for family in CASES for kind in CASES[family]])
def test_from_attach_to_detach(tmp_path: Path, family: str, kind: str) -> None:
    model, own = base_of(family), KINDS[kind][1]
    before, had, start = picture(model), attributes(model), output(model)
    base = dict(model.named_parameters())

    handle = lt.attach(model, config_of(family, kind))
    assert gap(output(model), start) < 1e-5 if kind == "orthogonal" else torch.equal(output(model), start)
    assert set(handle.replaced()) == {name for name in base if re.fullmatch(own, name)}
    assert bool(handle.replaced()) == bool(own)

    train_only_the_adapter(model, handle, base)
    trained = output(model)
    assert gap(trained, start) > 1e-3
    with handle.disabled():
        assert torch.equal(output(model), start)

    handle.save(tmp_path)
    other = base_of(family)
    lt.attach(other, tmp_path)
    assert torch.equal(output(other), trained)

    merge_and_return(model, handle, trained)
    assert torch.equal(output(model), trained)
    merge_in_bf16(family, tmp_path)

    assert handle.detach() is model
    assert picture(model) == before
    assert attributes(model) == had
