"""What the plan counts is what peft counts, and what an optimizer is given is all of it, once."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
import transformers

import loratune as lt
from tests.adapt.model import net
from tests.models import tiny

COUNTED: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora on gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "bias behind B": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "lora_bias": True}),
    "biases of targets": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "every bias": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "biases where there are none": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "a head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "an embedding": ("phi3", {"target_modules": ["qkv_proj"], "modules_to_save": ["embed_tokens"]}),
    "a tied head": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}),
    "a block": ("llama", {"target_modules": ["0.self_attn.q_proj"], "modules_to_save": ["layers.1.mlp"]}),
    "patterns": ("qwen3", {"target_modules": "all-linear", "rank_pattern": {"q_proj": 3}, "use_dora": True}),
    "pissa": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "pissa", "use_dora": True}),
}


@pytest.mark.parametrize("case", COUNTED)
def test_trainable_parameters_are_as_many_as_in_peft(case: str) -> None:
    family, settings = COUNTED[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny(family), peft.LoraConfig(r=4, **settings))
    trainable, _ = theirs.get_nb_trainable_parameters()
    model = tiny(family)
    total = sum(p.numel() for p in model.parameters())
    planned = lt.plan(model, lt.LoraConfig(r=4, **settings))
    assert planned.trainable == trainable
    assert planned.total == total + trainable
    handle = lt.attach(model, lt.LoraConfig(r=4, **settings))
    assert handle.count() == (trainable, total + trainable)
    assert sum(p.numel() for p in handle.parameters()) == trainable


def test_a_classifiers_head_counts() -> None:
    values: dict[str, Any] = {
        "vocab_size": 50,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "num_labels": 5,
        "pad_token_id": 0,
    }
    config = transformers.GPT2Config(**values)
    make: Any = transformers.AutoModelForSequenceClassification.from_config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ask = peft.LoraConfig(r=4, target_modules=["c_attn"], task_type="SEQ_CLS", bias="all")
        trainable, _ = peft.get_peft_model(make(config), ask).get_nb_trainable_parameters()
    planned = lt.plan(make(config), lt.LoraConfig(r=4, target_modules=["c_attn"], bias="all"))
    assert planned.trainable == trainable
    assert planned.saved == ("score",)


# -- optimizer groups --------------------------------------------------------------------------------------------------

GROUPED: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "bias behind B": {"lora_bias": True},
    "biases": {"bias": "all"},
    "whole": {"modules_to_save": ["norm", "head"], "bias": "lora_only", "use_dora": True},
}


def grouped() -> lt.Adapters:
    base = lt.LoraConfig(r=2, target_modules=["q", "v"])
    handle = lt.attach(net(), base, name="plain")
    for name, settings in GROUPED.items():
        handle.add(base.replace(**settings), name)
    handle.add(base, "frozen")
    handle.freeze("frozen")
    return handle


@pytest.mark.parametrize("ratio", [None, 1.0, 16.0])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_groups_hold_everything_that_trains_once(ratio: float | None, decay: float) -> None:
    handle = grouped()
    groups = handle.param_groups(0.01, lora_plus_ratio=ratio, weight_decay=decay)
    found = [id(p) for group in groups for p in group["params"]]
    trains = {id(p) for p in handle.model.parameters() if p.requires_grad}
    assert len(found) == len(set(found))
    assert set(found) == trains == {id(p) for p in handle.parameters()}
    # By what it is: B and the bias behind it learn faster with LoRA+, matrices decay.
    expected: dict[int, tuple[float, float]] = {}
    for name in handle.names:
        for low_rank in handle.factors(name).values():
            fast, slow = 0.01 * (ratio or 1.0), 0.01
            expected |= {id(low_rank.A): (slow, decay), id(low_rank.B): (fast, decay)}
            expected |= {id(low_rank.bias): (fast, 0.0), id(low_rank.magnitude): (slow, 0.0)}
        expected |= {id(own): (0.01, decay * (own.ndim > 1)) for own in handle.replaced(name).values()}
    for group in groups:
        for parameter in group["params"]:
            assert (group["lr"], group["weight_decay"]) == expected[id(parameter)]
    assert len(groups) == len({(group["lr"], group["weight_decay"]) for group in groups})
    assert any(own.ndim == 2 for own in handle.replaced("whole").values())


def test_an_optimizer_takes_the_groups() -> None:
    handle = grouped()
    before = [p.detach().clone() for p in handle.parameters()]
    optimizer = torch.optim.AdamW(handle.param_groups(0.01, lora_plus_ratio=16.0, weight_decay=0.1))
    for parameter in handle.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(not torch.equal(p, was) for p, was in zip(handle.parameters(), before, strict=True))
