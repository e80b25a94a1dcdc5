"""Adapters written by peft load here with equal logits, and ours there (BEHAVIOUR 31)."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import loratune as lt
from loratune.errors import AdapterFileError
from tests.adapter.cases import (
    CASES,
    FROM_A_START,
    IDS,
    OTHER_WORDS,
    OURS_ONLY,
    WITH_SURPLUS,
    base_of,
    gap,
    logits,
    ours,
    randomise,
    theirs,
)
from tests.models import tiny

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_ours(tmp_path: Path, case: str) -> None:
    model, handle = ours(case)
    handle.save(tmp_path)
    base = base_of(case)
    before = logits(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft's word for a missing key or a wrong fan_in_fan_out
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True` and a tied layer")
        loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert gap(logits(model), before) > 0.05, "the adapter must matter for this to say anything"
    assert gap(logits(loaded.eval()), logits(model)) < 1e-5


BOTH = [case for case in CASES if case not in OURS_ONLY]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return dict(load_file(folder / TENSORS))


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    for key in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save"):
        config[key] = sorted(config[key]) if isinstance(config[key], list) else config[key]
    return config


@pytest.mark.parametrize("case", BOTH)
def test_ours_reads_pefts(tmp_path: Path, case: str) -> None:
    reference = theirs(case)
    reference.save_pretrained(tmp_path / "theirs")
    model, before = base_of(case), logits(base_of(case))
    handle = lt.attach(model, tmp_path / "theirs")
    assert gap(logits(reference), before) > 0.05, "the adapter must matter for this to say anything"
    assert gap(logits(model), logits(reference)) < 1e-5
    with handle.disabled():
        assert torch.equal(logits(model), before)
    handle.save(tmp_path / "again")
    again = base_of(case)
    lt.attach(again, tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("case", [case for case in BOTH if case not in FROM_A_START])
def test_what_peft_wrote_is_written_again_as_it_was(tmp_path: Path, case: str) -> None:
    theirs(case).save_pretrained(tmp_path / "theirs")
    handle = lt.attach(base_of(case), tmp_path / "theirs")
    handle.save(tmp_path / "again")
    first, second = (tensors_of(tmp_path / name) for name in ("theirs", "again"))
    surplus = first.keys() - second.keys()
    assert bool(surplus) == (case in WITH_SURPLUS)
    assert all(".modules_to_save." in key or ".original_module." in key or ".base_layer." in key for key in surplus)
    assert len(surplus) == sum("is not needed" in note for note in handle.plan().notes)
    assert second.keys() <= first.keys()
    assert all(torch.equal(first[key], second[key]) for key in second)
    if not surplus:
        assert (tmp_path / "theirs" / TENSORS).read_bytes() == (tmp_path / "again" / TENSORS).read_bytes()

    was, now = config_of(tmp_path / "theirs"), config_of(tmp_path / "again")
    # Theirs knows the class the model was made by; one layer and a list of one are the same.
    different = {key for key in was if was[key] != now[key]} - {"auto_mapping", "base_model_name_or_path"}
    assert different <= {"layers_pattern", "layers_to_transform"} | OTHER_WORDS.get(case, set()), different


@pytest.mark.parametrize("case", FROM_A_START)
def test_what_counts_from_a_start_becomes_plain(tmp_path: Path, case: str) -> None:
    theirs(case).save_pretrained(tmp_path / "theirs")
    handle = lt.attach(base_of(case), tmp_path / "theirs")
    handle.save(tmp_path / "again")
    first, second = (tensors_of(tmp_path / name) for name in ("theirs", "again"))
    assert first.keys() == second.keys()
    for key in first:
        ranks = [2 if (".lora_A" in key, axis) in ((True, 0), (False, 1)) else 1 for axis in range(first[key].ndim)]
        assert tuple(second[key].shape) == tuple(n * more for n, more in zip(first[key].shape, ranks, strict=True))
    was, now = config_of(tmp_path / "theirs"), config_of(tmp_path / "again")
    assert (now["init_lora_weights"], now["r"]) == (True, 2 * was["r"])
    assert now["rank_pattern"] == {pattern: 2 * r for pattern, r in was["rank_pattern"].items()}
    scales = {path: low_rank.scale for path, low_rank in handle.factors().items()}
    again = lt.attach(base_of(case), tmp_path / "again")
    assert {path: low_rank.scale for path, low_rank in again.factors().items()} == pytest.approx(scales, rel=1e-12)


def test_a_start_drawn_at_random_is_not_in_their_file(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa_niter_4"}
    peft.get_peft_model(tiny("llama"), peft.LoraConfig(**settings)).save_pretrained(tmp_path)
    model = tiny("llama")
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(AdapterFileError) as caught:
        lt.attach(model, tmp_path)
    why = "it counts from a start that was drawn at random, and that is not in the file"
    assert caught.value.problems == (f"{tmp_path}: init_lora_weights='pissa_niter_4': {why}",)
    assert [type(module) for module in model.modules()] == kinds
    # Ours is written as a plain one, so it has no start to miss.
    handle = lt.attach(model, lt.LoraConfig(**settings))
    randomise(model)
    handle.save(tmp_path / "ours")
    again = tiny("llama")
    lt.attach(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))


HEADLESS: dict[str, tuple[str, dict[str, Any], list[str] | None]] = {
    "llama": ("model", {"target_modules": ["q_proj"], "layers_to_transform": [1]}, ["layers"]),
    "gpt2": ("transformer", {"target_modules": "all-linear", "layers_to_transform": 0}, ["h"]),
    "qwen3": ("model", {"target_modules": ["v_proj"]}, None),
}


@pytest.mark.parametrize("family", HEADLESS)
def test_peft_finds_the_layers_of_a_model_without_a_head(tmp_path: Path, family: str) -> None:
    body, settings, lists = HEADLESS[family]
    model = getattr(tiny(family), body)
    lt.attach(model, lt.LoraConfig(r=4, **settings)).save(tmp_path)
    assert config_of(tmp_path)["layers_pattern"] == lists
    randomise(model)
    lt.adapters(model).save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(getattr(tiny(family), body), tmp_path).eval()
    again = getattr(tiny(family), body)
    lt.attach(again, tmp_path).save(tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(tmp_path)
    outputs = [net(IDS).last_hidden_state.detach() for net in (model, loaded, again, getattr(tiny(family), body))]
    assert gap(outputs[1], outputs[0]) < 1e-5
    assert torch.equal(outputs[2], outputs[0])
    assert gap(outputs[3], outputs[0]) > 0.05


def test_to_peft_norm_is_every_name_that_ends_so(tmp_path: Path) -> None:
    theirs("norms").save_pretrained(tmp_path / "theirs")
    read = lt.attach(base_of("norms"), tmp_path / "theirs")
    ends = {name for name, _ in base_of("norms").named_parameters() if name.endswith("norm.weight")}
    assert len(ends) == 5
    assert set(read.replaced()) == ends
    _, fresh = ours("norms")
    assert set(fresh.replaced()) == {"model.norm.weight"}
    fresh.save(tmp_path / "ours")
    assert config_of(tmp_path / "ours")["modules_to_save"] == ["model.norm"]


def test_peft_merges_ours_to_the_same_weights(tmp_path: Path) -> None:
    model, handle = ours("gpt2 all-linear")
    handle.save(tmp_path)
    merged = peft.PeftModel.from_pretrained(base_of("gpt2 all-linear"), tmp_path).merge_and_unload()
    handle.merge()
    for path in handle.factors():
        assert gap(model.get_submodule(path).weight, merged.get_submodule(path).weight) < 1e-6


def test_our_config_has_exactly_pefts_keys(tmp_path: Path) -> None:
    _, handle = ours("plain")
    handle.save(tmp_path / "ours")
    theirs("plain").save_pretrained(tmp_path / "theirs")
    ours_, theirs_ = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("ours", "theirs"))
    assert ours_.keys() == theirs_.keys()
    assert {key: type(ours_[key]) for key in ours_} == {key: type(theirs_[key]) for key in theirs_} | {
        "auto_mapping": type(None),  # the transformers class, which peft needs for its own `AutoPeftModel` only
        "task_type": str,  # ours is found from the model
        "base_model_name_or_path": type(ours_["base_model_name_or_path"]),
    }
    assert ours_["inference_mode"] is True
    assert ours_["peft_version"] == peft.__version__
