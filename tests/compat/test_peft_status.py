"""What `get_layer_status` and `get_model_status` say is what PEFT says of the same model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import peft
import pytest
from torch import nn

import loratune as lt
from loratune.compat import peft as compat
from loratune.errors import AdapterStateError
from tests.adapter.cases import IDS
from tests.compat.twin import both
from tests.models import tiny

MADE = """
from peft import LoraConfig, get_layer_status, get_model_status, get_peft_model
model = get_peft_model(tiny(family), LoraConfig(r=2, target_modules=targets, **settings))
model.add_adapter("b", LoraConfig(r=3, target_modules=more))
"""
LOOK = """
layers, whole = model.get_layer_status(), model.get_model_status()
layers_too, whole_too = get_layer_status(model), get_model_status(model)
"""
CASES: dict[str, dict[str, Any]] = {
    "linear": {"family": "llama", "targets": ["q_proj"], "more": ["q_proj", "v_proj"], "settings": {}},
    "conv1d": {"family": "gpt2", "targets": ["c_attn"], "more": ["c_attn"], "settings": {}},
    "whole": {
        "family": "llama",
        "targets": ["q_proj"],
        "more": ["up_proj"],
        "settings": {"modules_to_save": ["lm_head"]},
    },
    "dora": {"family": "llama", "targets": ["v_proj"], "more": ["q_proj"], "settings": {"use_dora": True}},
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
STATES = {
    "fresh": "",
    "switched": 'model.set_adapter("b")\n',
    "frozen": 'model.set_requires_grad("default", False)\n',
}


def told(found: Any) -> Any:
    """Layers in the order of their names: a model's modules may be walked in another one."""
    if isinstance(found, list):
        return sorted((asdict(layer) for layer in found), key=lambda layer: str(layer["name"]))
    return asdict(found)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("case", CASES)
def test_status_is_pefts(case: str, state: str) -> None:
    theirs, ours = both(MADE + STATES[state] + LOOK, **CASES[case])
    for name in ("layers", "whole", "layers_too", "whole_too"):
        assert told(getattr(ours, name)) == told(getattr(theirs, name)), name


def test_of_parameters_too() -> None:
    """As many as PEFT has wrappers, one in another."""
    made = (
        "from peft import LoraConfig, get_peft_model\n"
        "model = get_peft_model(tiny(family), LoraConfig(r=2, target_modules=targets, target_parameters=EXPERTS))\n"
        "layers = model.get_layer_status()\n"
    )
    theirs, ours = both(made, family="mixtral", targets=["q_proj"], EXPERTS=EXPERTS)
    assert told(ours.layers) == told(theirs.layers)
    assert sum(layer.module_type == "lora.ParamWrapper" for layer in ours.layers) == 4


def test_their_state_dicts_are_exchanged_for_parameters_too() -> None:
    made = (
        "from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict\n"
        "model = get_peft_model(tiny('mixtral'), LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS))\n"
        "randomise(model)\n"
        "state = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}\n"
        "other = get_peft_model(tiny('mixtral'), LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS))\n"
        "result = set_peft_model_state_dict(other, state)\n"
        "same = all(torch.equal(each, state[key]) for key, each in get_peft_model_state_dict(other).items())\n"
        "logits = other.eval()(IDS).logits.detach()\n"
    )
    theirs, ours = both(made, EXPERTS=EXPERTS)
    assert ours.state.keys() == theirs.state.keys()
    assert {key: tensor.shape for key, tensor in ours.state.items()} == {k: t.shape for k, t in theirs.state.items()}
    assert ours.same
    assert theirs.same
    compat.set_peft_model_state_dict(ours.other, theirs.state)
    logits = ours.other(IDS).logits
    assert float((logits - theirs.logits).detach().norm() / theirs.logits.norm()) < 1e-5
    assert float((logits - ours.logits).detach().norm()) > 1


def test_merged_adapters_are_named() -> None:
    theirs, ours = both(MADE + "model.merge_adapter()\n" + LOOK, **CASES["linear"])
    assert told(ours.layers) == told(theirs.layers)
    assert told(ours.whole) == told(theirs.whole)


def test_disabled_adapters_are_active_and_not_enabled() -> None:
    """As in PEFT, but that here nothing is frozen by it."""
    theirs, ours = both(MADE + "model.base_model.disable_adapter_layers()\n" + LOOK, **CASES["linear"])
    for name in ("enabled", "active_adapters", "available_adapters", "num_adapter_layers"):
        assert getattr(ours.whole, name) == getattr(theirs.whole, name), name
    assert (ours.whole.enabled, ours.whole.active_adapters) == (False, ["default"])


def test_fields_are_pefts() -> None:
    for kind in ("TunerLayerStatus", "TunerModelStatus"):
        theirs = getattr(peft.peft_model, kind).__dataclass_fields__
        assert list(getattr(compat.status, kind).__dataclass_fields__) == list(theirs)


def test_an_injected_adapter_has_a_status_too() -> None:
    model = tiny("llama")
    handle = lt.attach(model, lt.LoraConfig(target_modules=["q_proj"]))
    whole = compat.get_model_status(model)
    assert (whole.base_model_type, whole.adapter_model_type, whole.peft_types) == ("LlamaForCausalLM", "None", {})
    assert compat.get_layer_status(model)[0].name == "model.layers.0.self_attn.q_proj"
    with handle.disabled():
        assert not compat.get_model_status(model).enabled
    plain = nn.Sequential(nn.Linear(2, 2))
    lt.attach(plain, lt.LoraConfig(r=1, target_modules=["0"]))
    assert compat.get_model_status(plain).base_model_type == "other"


def test_partly_frozen_is_irregular_and_no_adapter_an_error() -> None:
    model = tiny("llama")
    handle = lt.attach(model, lt.LoraConfig(target_modules=["q_proj"]))
    handle.parameters()[0].requires_grad_(False)
    assert compat.get_model_status(model).requires_grad == {"default": "irregular"}
    handle.activate()
    handle.remove("default")
    with pytest.raises(AdapterStateError, match="no adapter left"):
        compat.get_layer_status(model)
