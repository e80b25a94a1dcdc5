"""`ensure_weight_tying`: modules that are tied train as one, and stay tied in files and merged weights."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import loratune as lt
from loratune.errors import AdapterFileError, TargetError
from tests.adapt.model import bits
from tests.adapter.cases import IDS, gap, logits, randomise
from tests.models import tiny

TENSORS, KEY = "adapter_model.safetensors", "base_model.model."
# Family → (target, what is tied, ways to name it).
TIED: dict[str, tuple[str, set[str], list[list[str]]]] = {
    "llama": (
        "q_proj",
        {"model.embed_tokens.weight", "lm_head.weight"},
        [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]],
    ),
    "gpt2": ("c_attn", {"transformer.wte.weight", "lm_head.weight"}, [["lm_head"], ["wte"]]),
}
CASES = [(family, names) for family, (*_, ways) in TIED.items() for names in ways]


def base_of(family: str) -> Any:
    return tiny(family, tie_word_embeddings=True)


def settings_of(family: str, names: list[str]) -> dict[str, Any]:
    target, *_ = TIED[family]
    return {
        "r": 4, "lora_alpha": 8, "target_modules": [target], "modules_to_save": list(names),
        "ensure_weight_tying": True, "task_type": "CAUSAL_LM",
    }  # fmt: skip


def trained(family: str, names: list[str]) -> tuple[Any, lt.Adapters]:
    model = base_of(family)
    handle = lt.attach(model, lt.LoraConfig(**settings_of(family, names)))
    randomise(model)
    return model, handle


@pytest.mark.parametrize(("family", "names"), CASES)
def test_both_are_one_parameter_and_train_together(family: str, names: list[str]) -> None:
    model = base_of(family)
    handle = lt.attach(model, lt.LoraConfig(**settings_of(family, names)))
    own = handle.replaced()
    assert set(own) == TIED[family][1]
    (one,) = set(own.values())
    assert [p is one for p in handle.parameters()].count(True) == 1
    assert handle.count().trainable == handle.plan().trainable == sum(p.numel() for p in handle.parameters())
    assert not [note for note in handle.plan().notes if "parts from" in note]
    optimizer = torch.optim.SGD(handle.param_groups(lr=0.1))
    before = one.detach().clone()
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(one, before)
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert torch.equal(embed.weight, head.weight)
    assert embed._parameters["weight"] is head._parameters["weight"]
    (twin,) = set(lt.adapters(copy.deepcopy(model)).replaced().values())
    assert torch.equal(twin, one)


@pytest.mark.parametrize(("family", "names"), CASES)
def test_saved_loaded_and_read_by_peft(tmp_path: Path, family: str, names: list[str]) -> None:
    model, handle = trained(family, names)
    handle.save(tmp_path / "first")
    tensors = load_file(tmp_path / "first" / TENSORS)
    first, second = (tensors[KEY + name] for name in TIED[family][1])
    assert torch.equal(first, second)
    again = base_of(family)
    loaded = lt.attach(again, tmp_path / "first", trainable=True)
    assert torch.equal(logits(again), logits(model))
    assert len(set(loaded.replaced().values())) == 1
    loaded.save(tmp_path / "second")
    for file in (TENSORS, "adapter_config.json"):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base_of(family), tmp_path / "first", is_trainable=True).eval()
    assert gap(logits(theirs), logits(model)) < 1e-5
    assert sum(p.requires_grad and "modules_to_save" in name for name, p in theirs.named_parameters()) == 1


@pytest.mark.parametrize("names", TIED["llama"][2])
def test_what_peft_writes_loads_tied(tmp_path: Path, names: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base_of("llama"), peft.LoraConfig(**settings_of("llama", names)))
        randomise(theirs)
        theirs.eval().save_pretrained(str(tmp_path))
    model = base_of("llama")
    handle = lt.attach(model, tmp_path)
    assert gap(logits(model), logits(theirs)) < 1e-5
    assert len(set(handle.replaced().values())) == 1
    handle.save(tmp_path / "ours")
    ours, first = (load_file(folder / TENSORS) for folder in (tmp_path / "ours", tmp_path))
    assert ours.keys() == first.keys()
    assert all(torch.equal(ours[key], first[key]) for key in ours)


@pytest.mark.parametrize("keep_base", [True, False])
def test_merged_it_stays_tied(keep_base: bool) -> None:
    model, handle = trained("llama", ["lm_head"])
    expected, base = logits(model), bits(model.lm_head._parameters["weight"])
    handle.merge(keep_base=keep_base)
    assert gap(logits(model), expected) < 1e-5
    assert model.lm_head._parameters["weight"] is model.model.embed_tokens._parameters["weight"]
    if keep_base:
        handle.unmerge()
        assert bits(model.lm_head._parameters["weight"]) == base
        assert torch.equal(logits(model), expected)


def test_tied_tensors_that_differ_in_a_file_are_refused(tmp_path: Path) -> None:
    _, handle = trained("llama", ["lm_head"])
    handle.save(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    tensors[f"{KEY}lm_head.weight"] += 1
    save_file(tensors, tmp_path / TENSORS, metadata={"format": "pt"})
    with pytest.raises(AdapterFileError, match="its config ties them, and they differ"):
        lt.attach(base_of("llama"), tmp_path)


def test_where_nothing_is_tied_it_is_said() -> None:
    config = lt.LoraConfig(**settings_of("llama", ["lm_head"]))
    plan = lt.plan(tiny("llama", tie_word_embeddings=False), config)
    assert "ensure_weight_tying: no module of modules_to_save is tied to another" in plan.notes


def test_a_tied_target_is_refused() -> None:
    config = lt.LoraConfig(target_modules=["lm_head"], ensure_weight_tying=True)
    with pytest.raises(TargetError, match=r"lm_head: .* tied to model\.embed_tokens"):
        lt.attach(base_of("llama"), config)
