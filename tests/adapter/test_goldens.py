"""Folders that peft 0.21.2 wrote are read and written again as they were; peft itself is not needed (BEHAVIOUR 31)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import loratune as lt
from loratune.adapter import card_of, read_adapter, write_adapter
from tests.adapter.goldens.make import FILES, GOLDENS, HERE, base_of

CONFIG, TENSORS = FILES
KEY = "base_model.model."
# Keys that hold a set of names: peft writes it in any order.
SETS = ("target_modules", "modules_to_save", "exclude_modules")
# peft writes these biases a second and a third time, from inside its wrapper, and the table of a targeted embedding.
SURPLUS = {
    "every_bias_and_a_norm": {
        f"{KEY}transformer.ln_f.{wrapper}.bias" for wrapper in ("original_module", "modules_to_save")
    },
    "embedding": {f"{KEY}model.embed_tokens.base_layer.weight"},
}
# What a folder says in other words once the model is known: which norms there are, and which of two heads.
OTHER_WORDS = {"norms": {"modules_to_save"}, "classifier": {"modules_to_save"}}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    # The class that the model was made by is for peft's own loader.
    return {
        key: sorted(value) if key in SETS and isinstance(value, list) else value
        for key, value in config.items()
        if key != "auto_mapping"
    }


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return dict(load_file(folder / TENSORS))


def assert_same_tensors(name: str, again: Path) -> None:
    was, now = tensors_of(HERE / name), tensors_of(again)
    assert was.keys() - now.keys() == SURPLUS.get(name, set())
    assert now.keys() <= was.keys()
    for key, tensor in now.items():
        assert tensor.dtype == was[key].dtype
        assert torch.equal(tensor, was[key]), key
    if name not in SURPLUS:
        assert (again / TENSORS).read_bytes() == (HERE / name / TENSORS).read_bytes()


def test_every_folder_is_small_and_known() -> None:
    folders = {path.name for path in HERE.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert folders == set(GOLDENS)
    for name in GOLDENS:
        assert {path.name for path in (HERE / name).iterdir()} == set(FILES)
        assert sum(path.stat().st_size for path in (HERE / name).iterdir()) < 60_000
        assert config_of(HERE / name)["peft_version"] == "0.21.2"


@pytest.mark.parametrize("name", GOLDENS)
def test_as_a_value_it_is_written_as_it_was(tmp_path: Path, name: str) -> None:
    saved = read_adapter(HERE / name)
    assert set(saved.surplus) == SURPLUS.get(name, set())
    assert not saved.unknown
    write_adapter(tmp_path, saved, card=card_of(saved))
    assert_same_tensors(name, tmp_path)
    assert config_of(tmp_path) == config_of(HERE / name)


@pytest.mark.parametrize("name", [name for name in GOLDENS if name != "pissa"])
def test_through_a_model_it_is_written_as_it_was(tmp_path: Path, name: str) -> None:
    handle = lt.attach(base_of(name), HERE / name)
    handle.save(tmp_path)
    assert_same_tensors(name, tmp_path)
    was, now = config_of(HERE / name), config_of(tmp_path)
    assert now.keys() == was.keys()
    different = {key for key in was if was[key] != now[key]} - {"base_model_name_or_path"}
    assert different == OTHER_WORDS.get(name, set())
    assert lt.attach(base_of(name), tmp_path).plan().replaced == handle.plan().replaced


def test_the_names_that_another_reader_would_guess_are_written_out(tmp_path: Path) -> None:
    lt.attach(base_of("norms"), HERE / "norms").save(tmp_path / "norms")
    layers = [f"model.layers.{i}.{kind}_layernorm" for i in (0, 1) for kind in ("input", "post_attention")]
    assert config_of(tmp_path / "norms")["modules_to_save"] == sorted([*layers, "model.norm"])
    lt.attach(base_of("classifier"), HERE / "classifier").save(tmp_path / "classifier")
    assert config_of(tmp_path / "classifier")["modules_to_save"] == ["score"]


def test_pissa_is_counted_from_its_start_and_written_as_a_plain_one(tmp_path: Path) -> None:
    model = base_of("pissa")
    before = model(torch.arange(6)[None]).logits
    handle = lt.attach(model, HERE / "pissa")
    handle.save(tmp_path)
    was, now = tensors_of(HERE / "pissa"), tensors_of(tmp_path)
    assert was.keys() == now.keys()
    assert {tensor.shape for tensor in now.values()} == {(4, 32), (32, 4)}
    a = f"{KEY}model.layers.1.self_attn.q_proj.lora_A.weight"
    assert torch.equal(now[a][:2], was[a])
    config = config_of(tmp_path)
    assert (config["init_lora_weights"], config["r"], config["lora_alpha"]) == (True, 4, 8)
    assert not torch.equal(model(torch.arange(6)[None]).logits, before)


def test_all_settings_of_a_folder_are_read() -> None:
    config = read_adapter(HERE / "rslora_patterns").config
    assert (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (2, 4, True, 0.1)
    assert config.rank_pattern == {"v_proj": 3}
    assert config.alpha_pattern == {r"layers\.1\.self_attn\.q_proj": 5}
    scales = {path: low_rank.scale for path, low_rank in lt.attach(base_of("norms"), HERE / "norms").factors().items()}
    assert scales == {"model.layers.0.self_attn.q_proj": 2.0}
    assert read_adapter(HERE / "bias_behind_b").config.lora_bias
    assert read_adapter(HERE / "dora").config.use_dora
