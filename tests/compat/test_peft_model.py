"""`PeftModel` as an object: what it delegates, copies, counts and refuses."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import loratune as lt
from loratune.compat import peft as compat
from loratune.compat.peft import LoraConfig, PeftModel, TaskType, get_peft_model
from loratune.config.methods import settings_of
from loratune.errors import AdapterFileError, AdapterStateError, ConfigError, MergedError, TargetError
from tests.adapter.cases import IDS, gap, logits
from tests.compat.twin import adapter
from tests.models import saved, tiny


def made(family: str = "gpt2", **settings: Any) -> PeftModel:
    targets = ["c_attn"] if family == "gpt2" else ["q_proj"]
    return get_peft_model(tiny(family), LoraConfig(**{"r": 4, "target_modules": targets, **settings}))


# -- names and configs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(compat.__all__))
def test_every_name_is_pefts(name: str) -> None:
    assert hasattr(peft, name)


def test_config_has_pefts_defaults() -> None:
    ours, theirs = LoraConfig(), peft.LoraConfig()
    for name in settings_of("LORA", lt.LoraConfig.names()):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert LoraConfig().lora_alpha == 8 != lt.LoraConfig().lora_alpha


def test_config_takes_pefts_spellings() -> None:
    config = LoraConfig(task_type=TaskType.SEQ_CLS, target_modules={"b", "a"}, inference_mode=True, peft_type="LORA")
    assert (config.task_type, config.target_modules, config.inference_mode) == ("SEQ_CLS", ("a", "b"), True)
    assert LoraConfig(task_type=peft.TaskType.CAUSAL_LM).task_type == TaskType.CAUSAL_LM
    config.base_model_name_or_path = "somewhere"
    assert config.to_dict()["base_model_name_or_path"] == "somewhere"
    assert config.replace(r=3).lora_alpha == 8


@pytest.mark.parametrize("task", TaskType)
def test_class_is_chosen_by_task_as_in_peft(task: TaskType) -> None:
    ours = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], task_type=task))
    assert type(ours).__name__ == peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task.value].__name__


def test_without_a_task_the_models_class_tells_it(tmp_path: Path) -> None:
    """In PEFT it is a plain PeftModel, and the Trainer finds columns and labels by PEFT's own class."""
    assert type(made()) is compat.PeftModelForCausalLM
    loaded = PeftModel.from_pretrained(tiny("gpt2"), adapter(tmp_path, task_type=None))
    assert type(loaded) is compat.PeftModelForCausalLM
    plain = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(r=1, target_modules=["0"]))
    assert type(plain) is PeftModel


def test_plain_config_of_ours_works_too() -> None:
    model = get_peft_model(tiny("gpt2"), lt.LoraConfig(target_modules=["c_attn"]))  # type: ignore[arg-type]
    assert model.peft_config["default"].lora_alpha == 16


def test_inference_mode_freezes() -> None:
    assert made(inference_mode=True).get_nb_trainable_parameters()[0] == 0
    assert made().get_nb_trainable_parameters()[0] > 0


# -- the wrapper -------------------------------------------------------------------------------------------------


def test_user_model_stays_the_same_object() -> None:
    base = tiny("gpt2")
    model = get_peft_model(base, LoraConfig(target_modules=["c_attn"]))
    assert model.base_model.model is base
    assert model.get_base_model() is base
    assert lt.adapters(base) is model.base_model.handle
    assert all(name.startswith("base_model.model.") for name in model.state_dict())


@pytest.mark.parametrize("name", ["config", "device", "dtype", "generation_config", "name_or_path", "transformer"])
def test_unknown_attributes_are_the_bases(name: str) -> None:
    model = made()
    found, expected = getattr(model, name), getattr(model.get_base_model(), name)
    assert found is expected or found == expected


def test_methods_of_the_base_are_reached() -> None:
    model = made("llama")
    assert model.get_input_embeddings() is model.get_base_model().get_input_embeddings()  # type: ignore[operator]
    model.enable_input_require_grads()
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


def test_repr_names_the_class() -> None:
    assert repr(made(task_type="CAUSAL_LM")).startswith("PeftModelForCausalLM(\n  (base_model): LoraModel(")


def test_copies_and_files_of_the_object_keep_their_own_adapters(tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(tiny("gpt2"), adapter(tmp_path / "adapter"))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert torch.equal(logits(twin), logits(model))
        twin.add_adapter("more", LoraConfig(target_modules=["c_fc"]))
        assert list(model.peft_config) == ["default"]


def test_a_copy_of_a_disabled_model_is_disabled_and_can_be_enabled(tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(tiny("gpt2"), adapter(tmp_path))
    adapted, base = logits(model), logits(tiny("gpt2"))
    with model.disable_adapter():
        inside = copy.deepcopy(model)
    model.disable_adapter_layers()
    beside = pickle.loads(pickle.dumps(model))
    model.enable_adapter_layers()
    assert torch.equal(logits(model), adapted)
    for twin in (inside, beside):
        assert torch.equal(logits(twin), base)
        assert (twin.active_adapters, twin.get_model_status().enabled) == (["default"], False)
        twin.enable_adapter_layers()
        assert torch.equal(logits(twin), adapted)
        with twin.disable_adapter():
            assert torch.equal(logits(twin), base)
        assert torch.equal(logits(twin), adapted)


def test_any_module_can_be_wrapped() -> None:
    base = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    x = torch.ones(3, 4)
    assert torch.equal(model(x), base(x))
    assert model.get_nb_trainable_parameters() == (2 * (4 + 5), 2 * (4 + 5) + 20 + 5 + 12)


def test_adapters_are_fp32_unless_told(tmp_path: Path) -> None:
    folder = adapter(tmp_path, family="llama")
    for asked, expected in ((True, torch.float32), (False, torch.bfloat16)):
        model = PeftModel.from_pretrained(tiny("llama").bfloat16(), folder, autocast_adapter_dtype=asked)
        assert {t.dtype for t in model.get_adapter_state_dict().values()} == {expected}


def test_loading_for_inference_means_evaluation_mode(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    assert not PeftModel.from_pretrained(tiny("gpt2").train(), folder).get_base_model().training
    model = PeftModel.from_pretrained(tiny("gpt2").train(), folder, is_trainable=True)
    assert model.get_base_model().training
    model.load_adapter(folder, "more", is_trainable=True)
    assert model.get_base_model().training
    model.load_adapter(folder, "other")
    assert not model.get_base_model().training


# -- states ------------------------------------------------------------------------------------------------------


def test_layers_are_disabled_and_enabled(tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(tiny("gpt2"), adapter(tmp_path))
    adapted = logits(model)
    model.disable_adapter_layers()
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), logits(tiny("gpt2")))
    assert model.active_adapters == ["default"]
    model.enable_adapter_layers()
    assert torch.equal(logits(model), adapted)


def test_block_that_fails_enables_again(tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(tiny("gpt2"), adapter(tmp_path))
    adapted = logits(model)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(logits(model), adapted)
    assert model.active_adapter == "default"


def test_deleting_the_active_adapter_says_which_is_active() -> None:
    model = made()
    model.add_adapter("b", LoraConfig(target_modules=["c_attn"]))
    with pytest.warns(UserWarning, match="'b' is active now"):
        model.delete_adapter("default")
    assert model.active_adapter == "b"
    model.delete_adapter("b")
    assert list(model.peft_config) == []


def test_merge_and_unload_of_named_adapters(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / str(seed), family="llama", seed=seed) for seed in (1, 2)]
    model = PeftModel.from_pretrained(tiny("llama"), folders[0], adapter_name="a")
    model.load_adapter(folders[1], "b")
    model.set_adapter("b")
    expected = logits(model)
    model.set_adapter("a")
    merged = model.merge_and_unload(adapter_names=["b"])
    assert gap(logits(merged), expected) < 1e-5
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]


def test_refused_merge_changes_nothing(tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(tiny("llama"), adapter(tmp_path, family="llama"), adapter_name="a")
    model.add_adapter("broken", LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        next(iter(model.get_adapter_state_dict("broken").values())).fill_(torch.nan)
    before = logits(model)
    with pytest.raises(AdapterStateError, match="NaN"):
        model.merge_adapter(["broken"])
    assert model.active_adapters == ["a"]
    assert torch.equal(logits(model), before)


def test_cat_is_the_weighted_sum(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / str(seed), family="llama", seed=seed, r=r) for seed, r in ((1, 4), (2, 3))]
    model = PeftModel.from_pretrained(tiny("llama").double(), folders[0], adapter_name="a")
    model.load_adapter(folders[1], "b")
    model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "sum", combination_type="cat")

    def update(low_rank: Any) -> torch.Tensor:
        found: torch.Tensor = low_rank.scale * low_rank.B.double() @ low_rank.A.double()
        return found

    deltas = {name: model.base_model.handle.factors(name) for name in ("a", "b", "sum")}
    for path, whole in deltas["sum"].items():
        expected = 0.5 * update(deltas["a"][path]) - 2.0 * update(deltas["b"][path])
        assert gap(update(whole), expected) < 1e-6
    assert not any(low_rank.A.requires_grad for low_rank in deltas["sum"].values())
    assert model.active_adapters == ["a"]


# -- bases -------------------------------------------------------------------------------------------------------


def test_auto_model_finds_its_base(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "llama")
    start = tiny("llama")
    start.name_or_path = str(base)
    model = get_peft_model(start, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert model.peft_config["default"].base_model_name_or_path == str(base)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.2)
    model.save_pretrained(tmp_path / "adapter")
    again = compat.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
    assert again.dtype is torch.float32


def test_kbit_preparation_freezes_casts_and_recomputes() -> None:
    model = tiny("llama").bfloat16().requires_grad_(True)
    model.is_loaded_in_4bit = True
    assert compat.prepare_model_for_kbit_training(model) is model
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, False)}
    assert model.is_activation_checkpointing
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).train()
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in adapted.parameters() if p.requires_grad)


def test_kbit_preparation_recomputes_quantised_models_only() -> None:
    assert not compat.prepare_model_for_kbit_training(tiny("llama")).is_activation_checkpointing


# -- refusals ----------------------------------------------------------------------------------------------------


def test_errors_of_the_handle_come_through(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="did you mean 'c_attn'"):
        get_peft_model(tiny("gpt2"), LoraConfig(target_modules=["c_atn"]))
    with pytest.raises(ConfigError, match="lora_dropout"):
        LoraConfig(lora_dropout=7.0)
    with pytest.raises(ConfigError, match="no adapter"):
        get_peft_model(tiny("gpt2"), peft.LoraConfig(target_modules=["c_attn"]))  # type: ignore[arg-type]
    with pytest.raises(AdapterFileError, match="no such folder"):
        PeftModel.from_pretrained(tiny("gpt2"), tmp_path / "nothing")
    model = made()
    with pytest.raises(AdapterStateError, match="adapters already"):
        get_peft_model(model, LoraConfig(target_modules=["c_attn"]))
    with pytest.raises(AdapterStateError, match="no adapter 'defalt'"):
        model.set_adapter("defalt")
    with pytest.raises(AdapterStateError, match="is there already"):
        model.add_adapter("default", LoraConfig(target_modules=["c_attn"]))
    with pytest.raises(AdapterStateError, match="no adapter 'b'"):
        model.save_pretrained(tmp_path / "out", selected_adapters=["default", "b"])
    assert not (tmp_path / "out").exists()
    model.merge_adapter()
    with pytest.raises(MergedError), model.disable_adapter():
        pass
    assert model.active_adapter == "default"


def test_loading_into_an_adapter_of_another_shape_changes_nothing(tmp_path: Path) -> None:
    model = made(r=3)
    before = {key: tensor.clone() for key, tensor in model.get_adapter_state_dict().items()}
    with pytest.raises(AdapterFileError, match=r"\(4, 32\), expected \(3, 32\)"):
        model.load_adapter(adapter(tmp_path), "default")
    assert all(torch.equal(before[key], tensor) for key, tensor in model.get_adapter_state_dict().items())


def test_tensors_reach_the_masters_of_whole_modules() -> None:
    """In a bf16 base a saved head trains in fp32 and is written in bf16: the live parameter is the one to change."""
    source, target = (
        get_peft_model(tiny("llama").bfloat16(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
        for _ in range(2)
    )
    head = "base_model.model.lm_head.weight"
    state = {**source.get_adapter_state_dict(), head: torch.full((400, 32), 0.5)}
    assert compat.set_peft_model_state_dict(target, state) == ([], [])
    assert torch.equal(target.get_adapter_state_dict()[head].float(), state[head])
    assert not logits(target.eval()).isnan().any()
    assert not torch.equal(logits(target), logits(source.eval()))


def test_adapter_relative_to_its_start_takes_no_tensors() -> None:
    model = made("llama", init_lora_weights="pissa")
    state = {key: tensor.clone() for key, tensor in model.get_adapter_state_dict().items()}
    with pytest.raises(AdapterStateError, match="pissa"):
        compat.set_peft_model_state_dict(model, state)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("linear", "not a weighted sum"),
        ("magnitude_prune", "not offered"),
        ("dare_ties", "not offered"),
        ("catt", "did you mean 'cat'"),
    ],
)
def test_combination_that_is_not_offered(kind: str, reason: str) -> None:
    model = made()
    model.add_adapter("b", LoraConfig(target_modules=["c_attn"]))
    with pytest.raises(ConfigError, match=reason):
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum", combination_type=kind)
    assert "sum" not in model.peft_config


def test_arguments_that_would_have_no_effect_are_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    config = LoraConfig(target_modules=["c_attn"])
    with pytest.raises(ConfigError, match="mixed=True"):
        get_peft_model(tiny("gpt2"), config, mixed=True)
    with pytest.raises(ConfigError, match="key_mapping"):
        PeftModel.from_pretrained(tiny("gpt2"), folder, key_mapping={"a": "b"})
    with pytest.raises(ConfigError, match="differs from the one in"):
        PeftModel.from_pretrained(tiny("gpt2"), folder, config=LoraConfig(r=5))
    with pytest.raises(ConfigError, match="pickle"):
        made().save_pretrained(tmp_path / "out", safe_serialization=False)
    with pytest.raises(ConfigError, match="names no base model"):
        compat.AutoPeftModelForCausalLM.from_pretrained(folder)
    same = compat.PeftConfig.from_pretrained(folder)
    assert PeftModel.from_pretrained(tiny("gpt2"), folder, config=same).active_adapter == "default"


def test_mixed_batches_are_for_inference_and_known_names(tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(tiny("gpt2"), adapter(tmp_path))
    with pytest.raises(AdapterStateError, match="nobody"):
        model(input_ids=IDS, adapter_names=["default", "nobody"])
    with pytest.raises(AdapterStateError):
        model(input_ids=IDS, adapter_names=["default"])
    with pytest.raises(AdapterStateError, match="inference"):
        model.train()(input_ids=IDS, adapter_names=["default", "default"])
