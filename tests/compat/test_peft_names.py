"""Every name that PEFT exports is here, or says what there is instead."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import loratune as lt
from loratune.compat import peft as compat
from loratune.compat.peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from loratune.errors import ConfigError, MergedError, ModelError, TargetError
from tests.adapter.cases import logits
from tests.compat.twin import adapter
from tests.models import saved, tiny


def imported(name: str) -> Any:
    variables: dict[str, Any] = {}
    exec(f"from loratune.compat.peft import {name}", variables)
    return variables[name]


@pytest.mark.parametrize("name", peft.__all__)
def test_every_name_of_peft_works_or_says_what_is_there_instead(name: str) -> None:
    if name in compat.__all__:
        assert imported(name) is not None
        return
    with pytest.raises(ImportError) as caught:
        imported(name)
    assert name in str(caught.value)
    assert "loratune.compat.peft" in str(caught.value)
    assert "cannot import name" not in str(caught.value), "this is Python's own message, which helps nobody"


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("LoftQConfig", "'pissa'"),
        ("OFTConfig", "LoRA, VeRA and IA3 are here"),
        ("PeftMixedModel", "add_weighted_adapter"),
        ("PrefixTuningConfig", "not PrefixTuning"),
        ("LoraConfg", "did you mean 'LoraConfig'"),
    ],
)
def test_names_that_are_missing_say_what_is_there(name: str, instead: str) -> None:
    with pytest.raises((ImportError, AttributeError), match=instead):
        getattr(compat, name)


def test_a_name_that_nobody_has_is_no_attribute() -> None:
    assert not hasattr(compat, "no_such_name")
    with pytest.raises(AttributeError, match="did you mean 'get_peft_model'"):
        _ = compat.get_peft_modle


def test_mappings_hold_what_is_here() -> None:
    assert set(compat.MODEL_TYPE_TO_PEFT_MODEL_MAPPING) == set(peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING)
    assert compat.PEFT_TYPE_TO_CONFIG_MAPPING["LORA"] is LoraConfig  # type: ignore[index]  # as PEFT's users write it
    assert compat.PEFT_TYPE_TO_TUNER_MAPPING[compat.PeftType.LORA] is compat.LoraModel


def test_errors_are_caught_under_pefts_names() -> None:
    with pytest.raises(compat.NoMatchingPeftModuleError):
        get_peft_model(tiny("gpt2"), LoraConfig(target_modules=["nothing"]))
    assert issubclass(TargetError, compat.PeftError)


# -- a saved adapter with its base -------------------------------------------------------------------------------


def with_base(folder: Path, task: str | None = "CAUSAL_LM") -> Path:
    base = saved(folder / "base", "llama")
    model = tiny("llama")
    model.name_or_path = str(base)
    found = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type=task, init_lora_weights=False))
    found.save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize("kind", [AutoPeftModel, compat.AutoPeftModelForCausalLM])
def test_auto_model_of_a_causal_model(tmp_path: Path, kind: type[AutoPeftModel]) -> None:
    folder = with_base(tmp_path)
    model = kind.from_pretrained(folder, dtype=torch.float32, import_allowlist=["transformers"])
    assert type(model) is compat.PeftModelForCausalLM
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(tiny("llama"), folder)))


@pytest.mark.parametrize(
    "kind",
    [
        compat.AutoPeftModelForSeq2SeqLM,
        compat.AutoPeftModelForSequenceClassification,
        compat.AutoPeftModelForTokenClassification,
        compat.AutoPeftModelForQuestionAnswering,
        compat.AutoPeftModelForFeatureExtraction,
    ],
)
def test_bases_with_other_heads_are_loaded_by_hand(tmp_path: Path, kind: type[AutoPeftModel]) -> None:
    assert kind.task is not None
    folder = adapter(tmp_path, task_type=kind.task, target_modules=["c_attn"])
    with pytest.raises(ConfigError, match="CAUSAL_LM alone") as caught:
        kind.from_pretrained(folder)
    theirs: Any = getattr(peft, kind.__name__)
    assert f"{theirs._target_class.__name__}.from_pretrained" in caught.value.hint
    assert f"{theirs._target_peft_class.__name__}.from_pretrained" in caught.value.hint


def test_auto_model_of_another_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its task is CAUSAL_LM, not SEQ_CLS"):
        compat.AutoPeftModelForSequenceClassification.from_pretrained(adapter(tmp_path / "a"))
    with pytest.raises(ConfigError, match="names no task"):
        AutoPeftModel.from_pretrained(adapter(tmp_path / "b", task_type=None))


# -- files and bases ---------------------------------------------------------------------------------------------


def test_weights_of_a_folder_are_those_that_peft_reads(tmp_path: Path) -> None:
    folder = adapter(tmp_path, family="llama", modules_to_save=["lm_head"])
    theirs, ours = (load(str(folder), device="cpu") for load in (peft.load_peft_weights, compat.load_peft_weights))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    with pytest.raises(ConfigError, match="key_mapping"):
        compat.load_peft_weights(folder, key_mapping={"a": "b"})


def test_a_config_is_made_from_its_dictionary() -> None:
    theirs = peft.LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path="someone/tiny")
    ours = compat.get_peft_config(theirs.to_dict())
    assert (ours.r, ours.lora_alpha, ours.target_modules) == (4, 8, ("q_proj",))
    assert ours.base_model_name_or_path == "someone/tiny"
    assert compat.get_peft_config(ours.to_dict()) == ours
    with pytest.raises(ConfigError, match="'LOHA': only 'LORA', 'VERA', 'IA3' are here"):
        compat.get_peft_config({**theirs.to_dict(), "peft_type": "LOHA"})
    with pytest.raises(ConfigError, match="None"):
        compat.get_peft_config({"r": 4})


OTHERS = {
    "vera": ("VeraConfig", {"r": 8, "vera_dropout": 0.1, "bias": "vera_only", "target_modules": ["q_proj"]}),
    "ia3": ("IA3Config", {"target_modules": ["down_proj", "k_proj"], "feedforward_modules": ["down_proj"]}),
}


@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_have_pefts_settings(tmp_path: Path, method: str) -> None:
    name, settings = OTHERS[method]
    ours, theirs = (getattr(module, name)(**settings) for module in (compat, peft))
    assert ours.peft_type == theirs.peft_type.value
    for setting, value in settings.items():
        assert getattr(ours, setting) in (value, tuple(value) if isinstance(value, list) else "lora_only")
    assert compat.get_peft_config(theirs.to_dict()).to_dict() == ours.to_dict()
    assert compat.get_peft_config(ours.to_dict()).to_dict() == ours.to_dict()
    model = get_peft_model(tiny("llama"), ours)
    assert isinstance(model, PeftModel)
    assert model.peft_type == ours.peft_type
    model.save_pretrained(tmp_path)
    assert type(compat.PeftConfig.from_pretrained(tmp_path)) is type(ours)
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert again.peft_config["default"].peft_type == ours.peft_type
    read = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert read.peft_config["default"].to_dict()["peft_type"] == ours.peft_type
    with pytest.raises(ConfigError, match="lora_alpha"):
        getattr(compat, name)(lora_alpha=3)


def test_base_tensors_go_out_and_in_under_their_own_names() -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    other = tiny("llama", seed=1)
    assert compat.get_base_model_state_dict(model).keys() == other.state_dict().keys()
    assert compat.set_base_model_state_dict(model, other.state_dict()) == ([], [])
    assert all(torch.equal(t, other.state_dict()[key]) for key, t in compat.get_base_model_state_dict(model).items())
    before = {key: tensor.clone() for key, tensor in compat.get_base_model_state_dict(model).items()}
    broken = {**before, "lm_head.weigth": torch.zeros(400, 32), "model.norm.weight": torch.zeros(32)}
    del broken["lm_head.weight"]
    with pytest.raises(ModelError, match=r"lm_head\.weight is missing"):
        compat.set_base_model_state_dict(model, broken)
    assert all(torch.equal(t, before[key]) for key, t in compat.get_base_model_state_dict(model).items())
    assert compat.set_base_model_state_dict(model, broken, strict=False) == (["lm_head.weight"], ["lm_head.weigth"])
    assert not compat.get_base_model_state_dict(model)["model.norm.weight"].any()
    model.merge_adapter()
    with pytest.raises(MergedError):
        compat.set_base_model_state_dict(model, other.state_dict())


def test_what_is_frozen_is_cast_and_what_trains_is_not() -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    compat.cast_mixed_precision_params(model, torch.bfloat16)
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(True, torch.float32), (False, torch.bfloat16)}


def test_warnings_are_of_pefts_kind() -> None:
    model = get_peft_model(tiny("gpt2"), LoraConfig(target_modules=["c_attn"]))
    model.add_adapter("b", LoraConfig(target_modules=["c_attn"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=compat.PeftWarning)
        model.delete_adapter("default")


def test_names_work_on_a_model_without_a_wrapper() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    lt.attach(model, lt.LoraConfig(r=1, target_modules=["0"]))
    assert set(compat.get_base_model_state_dict(model)) == {"0.weight", "0.bias"}
