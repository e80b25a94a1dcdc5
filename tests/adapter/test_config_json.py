"""What `adapter_config.json` holds, key by key, for each method."""

from __future__ import annotations

from typing import Any

import pytest

import loratune as lt
from loratune.adapter.format import config_to_json
from loratune.adapter.value import SavedAdapter


def written(config: lt.LoraConfig, **own: Any) -> dict[str, Any]:
    return config_to_json(SavedAdapter(config, **own))


LISTS = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save")


@pytest.mark.parametrize("key", LISTS)
def test_names_stand_in_order(key: str) -> None:
    assert written(lt.LoraConfig(**{key: ["b", "c", "a"]}))[key] == ["a", "b", "c"]


def test_names_of_feedforward_modules_stand_in_order() -> None:
    config = lt.LoraConfig(peft_type="IA3", target_modules=["k", "down", "b"], feedforward_modules=["down", "b"])
    found = written(config)
    assert found["feedforward_modules"] == ["b", "down"]
    assert found["target_modules"] == ["b", "down", "k"]
    assert found["peft_type"] == "IA3"
    assert "lora_alpha" not in found


def test_a_pattern_stays_one() -> None:
    assert written(lt.LoraConfig(target_modules="all-linear"))["target_modules"] == "all-linear"


@pytest.mark.parametrize(("alpha", "said"), [(16, 16), (16.0, 16), (0.5, 0.5)])
def test_alpha_is_a_whole_number_where_it_is_one(alpha: float, said: float) -> None:
    found = written(lt.LoraConfig(lora_alpha=alpha))["lora_alpha"]
    assert found == said
    assert type(found) is type(said)


def test_a_start_that_peft_has_not_is_its_own() -> None:
    assert written(lt.LoraConfig(init_lora_weights="swapped"))["init_lora_weights"] is True
    assert written(lt.LoraConfig(init_lora_weights="orthogonal"))["init_lora_weights"] == "orthogonal"


def test_whose_adapter_it_is() -> None:
    found = written(lt.LoraConfig(r=3), base="a/base", revision="main", unknown={"of_another": [2, 1]})
    expected = {
        "base_model_name_or_path": "a/base",
        "revision": "main",
        "inference_mode": True,
        "auto_mapping": None,
        "peft_version": "0.21.2",
        "peft_type": "LORA",
        "r": 3,
        "of_another": [2, 1],
    }
    assert {key: found[key] for key in expected} == expected
    nobody = written(lt.LoraConfig())
    assert (nobody["base_model_name_or_path"], nobody["revision"]) == (None, None)
