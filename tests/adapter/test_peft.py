"""Adapters written by peft load here with equal logits, and ours there (BEHAVIOUR 31)."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import loratune as lt
from tests.adapter.cases import CASES, OURS_ONLY, base_of, gap, logits, ours, theirs

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_ours(tmp_path: Path, case: str) -> None:
    model, handle = ours(case)
    handle.save(tmp_path)
    base = base_of(case)
    before = logits(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft's word for a missing key or a wrong fan_in_fan_out
        loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert gap(logits(model), before) > 0.05, "the adapter must matter for this to say anything"
    assert gap(logits(loaded.eval()), logits(model)) < 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if case not in OURS_ONLY])
def test_ours_reads_pefts_and_writes_the_same_tensors(tmp_path: Path, case: str) -> None:
    reference = theirs(case)
    reference.save_pretrained(tmp_path / "theirs")
    model = base_of(case)
    handle = lt.attach(model, tmp_path / "theirs")
    assert gap(logits(model), logits(reference)) < 1e-5

    handle.save(tmp_path / "again")
    first, second = (load_file(tmp_path / name / TENSORS) for name in ("theirs", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert (tmp_path / "theirs" / TENSORS).read_bytes() == (tmp_path / "again" / TENSORS).read_bytes()

    was, now = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("theirs", "again"))
    for config in (was, now):
        for key in ("target_modules", "exclude_modules"):
            config[key] = sorted(config[key]) if isinstance(config[key], list) else config[key]
    # Theirs knows the class the model was made by; one layer and a list of one are the same.
    different = {key for key in was if was[key] != now[key]} - {"auto_mapping", "base_model_name_or_path"}
    assert different <= {"layers_pattern", "layers_to_transform"}, different
    model2 = base_of(case)
    lt.attach(model2, tmp_path / "again")
    assert torch.equal(logits(model2), logits(model))


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
