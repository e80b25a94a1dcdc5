"""Biases and modules that an adapter has its own of: they train, switch and travel; the base keeps its own (12, 15)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import loratune as lt
from loratune.errors import AdapterStateError
from tests.adapt.model import IDS, Net, bits, net, picture
from tests.models import VOCABULARY, tiny

TENSORS = "adapter_model.safetensors"
KEY = "base_model.model."
PLAIN = lt.LoraConfig(r=2, target_modules=["q"])
NORMS = PLAIN.replace(modules_to_save=["norm"])


def move(handle: lt.Adapters, name: str | None = None, seed: int = 0) -> None:
    """Other values for everything that trains, as training would give."""
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters(name):
            parameter.add_(torch.randn(parameter.shape, generator=dice) * 0.3)


def moved(config: lt.LoraConfig, dtype: torch.dtype = torch.float32) -> tuple[Net, lt.Adapters]:
    model = net(dtype)
    handle = lt.attach(model, config)
    move(handle)
    return model, handle


# -- which tensors -----------------------------------------------------------------------------------------------------

BIASES: dict[str, set[str]] = {
    "none": set(),
    "lora_only": {"blocks.0.q.bias", "blocks.1.q.bias"},
    "all": {f"blocks.{i}.{module}.bias" for i in (0, 1) for module in ("q", "v", "norm")},
}


@pytest.mark.parametrize("mode", BIASES)
def test_only_those_biases_train_and_are_saved(tmp_path: Path, mode: str) -> None:
    plain = net()
    model, handle = moved(PLAIN.replace(bias=mode))
    assert set(handle.replaced()) == BIASES[mode]
    assert len(handle.parameters()) == 2 * 2 + len(BIASES[mode])
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in handle.parameters()}
    handle.save(tmp_path)
    saved = load_file(tmp_path / TENSORS)
    low_rank = {f"{KEY}blocks.{i}.q.lora_{x}.weight" for i in (0, 1) for x in "AB"}
    biases = {KEY + name.replace(".q.", ".q.base_layer.") for name in BIASES[mode]}
    assert saved.keys() == low_rank | biases
    for name, own in handle.replaced().items():
        assert torch.equal(saved[KEY + name.replace(".q.", ".q.base_layer.")], own)
        assert not torch.equal(own, plain.get_parameter(name))
    with handle.disabled():
        assert bits(model(IDS)) == bits(plain(IDS))
    again = net()
    lt.attach(again, tmp_path)
    assert bits(again(IDS)) == bits(model(IDS)) != bits(plain(IDS))


def test_the_bases_own_biases_are_copied_for_the_start() -> None:
    model, handle = moved(PLAIN.replace(bias="all"))
    handle.detach()
    handle = lt.attach(model, PLAIN.replace(bias="all", init_lora_weights="gaussian"))
    for name, own in handle.replaced().items():
        assert torch.equal(own, net().get_parameter(name))
        path, _, last = name.rpartition(".")
        base = model.get_submodule(path)._parameters[last]
        assert base is not None
        assert own.data_ptr() != base.data_ptr(), "a copy"


def test_a_mode_without_any_bias_is_said() -> None:
    found = lt.plan(tiny("llama"), lt.LoraConfig(target_modules=["q_proj"], bias="lora_only"))
    assert not found.replaced
    assert found.notes == ("bias='lora_only': no such module has a bias",)


def test_a_module_is_saved_with_all_that_is_in_it() -> None:
    model = net()
    config = PLAIN.replace(target_modules=["blocks.0.q"], modules_to_save=["norm", "blocks.1"], bias="lora_only")
    handle = lt.attach(model, config)
    assert handle.plan().saved == ("blocks.0.norm", "blocks.1")
    inside = {f"blocks.1.{name}" for name, _ in Net.get_submodule(net(), "blocks.1").named_parameters()}
    assert len(inside) == 6
    assert set(handle.replaced()) == {"blocks.0.norm.weight", "blocks.0.norm.bias", "blocks.0.q.bias"} | inside
    plain, before = net(), bits(model(IDS))
    move(handle)
    with handle.disabled():
        assert bits(model(IDS)) == bits(plain(IDS)) == before
    x = torch.randn(2, 6)
    assert not torch.equal(model.blocks[1](x), plain.blocks[1](x))


def test_a_nested_module_travels(tmp_path: Path) -> None:
    model, handle = moved(PLAIN.replace(target_modules=["blocks.0.q"], modules_to_save=["blocks.1"]))
    handle.save(tmp_path)
    assert f"{KEY}blocks.1.v.weight" in load_file(tmp_path / TENSORS)
    again = net()
    lt.attach(again, tmp_path)
    assert bits(again(IDS)) == bits(model(IDS))


# -- several adapters --------------------------------------------------------------------------------------------------


def test_two_that_save_one_module_are_exact_alone_and_refused_together() -> None:
    model, handle = moved(NORMS)
    handle.add(NORMS.replace(bias="lora_only"), "second")
    move(handle, "second", seed=5)
    base = bits(net()(IDS))
    expected = {}
    for name in handle.names:
        single = net()
        lt.attach(single, handle.saved(name))
        expected[name] = bits(single(IDS))
    assert len({base, *expected.values()}) == 3
    for name in ("second", "default"):
        handle.activate(name)
        assert bits(model(IDS)) == expected[name]
    before = picture(model, handle)
    with pytest.raises(AdapterStateError) as caught:
        handle.activate("default", "second")
    shared = [f"blocks.{i}.norm.{name}" for i in (0, 1) for name in ("weight", "bias")]
    assert caught.value.problems == tuple(f"'default' and 'second' both have their own {full}" for full in shared)
    assert caught.value.hint == "activate one of them at a time"
    assert picture(model, handle) == before
    with handle.disabled():
        assert bits(model(IDS)) == base


def test_two_with_biases_of_different_modules_add_up() -> None:
    model, handle = moved(PLAIN.replace(bias="lora_only"))
    handle.add(PLAIN.replace(target_modules=["v"], bias="lora_only"), "second")
    move(handle, "second", seed=5)
    handle.activate("default", "second")
    together = model(IDS)
    handle.merge()
    assert torch.allclose(model(IDS), together, atol=1e-5)
    handle.unmerge()
    for name, path in (("default", "blocks.0.q"), ("second", "blocks.0.v")):
        assert torch.equal(model.get_submodule(path).bias, handle.replaced(name)[f"{path}.bias"])


def test_removing_renaming_and_freezing_include_what_is_replaced() -> None:
    model, handle = moved(NORMS)
    handle.add(NORMS, "second")
    move(handle, "second", seed=5)
    second = {name: bits(own) for name, own in handle.replaced("second").items()}
    handle.freeze("second")
    assert not any(own.requires_grad for own in handle.replaced("second").values())
    assert all(own.requires_grad for own in handle.replaced("default").values())
    handle.activate("second")
    expected = bits(model(IDS))
    handle.remove("default")
    handle.rename("second", "renamed")
    assert {name: bits(own) for name, own in handle.replaced("renamed").items()} == second
    assert bits(model(IDS)) == expected
    handle.activate()
    handle.remove("renamed")
    assert type(model.blocks[0].norm) is nn.LayerNorm
    assert not {"lora_replaced", "lora_state"} & {*vars(model.blocks[0].norm), *model.blocks[0].norm._modules}
    assert bits(model(IDS)) == bits(net()(IDS))


def test_the_loaded_one_is_frozen_unless_told(tmp_path: Path) -> None:
    model, handle = moved(NORMS.replace(bias="all", use_dora=True))
    handle.save(tmp_path)
    handle.load(tmp_path, "frozen")
    handle.load(tmp_path, "trains", trainable=True)
    assert handle.parameters("frozen") == []
    assert len(handle.parameters("trains")) == len(handle.parameters("default")) == 2 * 3 + 4 + 4
    expected = bits(model(IDS))
    for name in ("frozen", "trains"):
        handle.activate(name)
        assert bits(model(IDS)) == expected


# -- the base stays the base -------------------------------------------------------------------------------------------


def test_a_tied_head_parts_and_the_base_stays_tied(tmp_path: Path) -> None:
    model = net()
    handle = lt.attach(model, PLAIN.replace(modules_to_save=["head"]))
    assert handle.plan().notes == ("head.weight is trained whole and parts from embed.weight, which stays the base's",)
    move(handle)
    assert model.head._parameters["weight"] is model.embed.weight
    assert torch.equal(model.embed.weight, net().embed.weight)
    assert torch.equal(model.head.weight, handle.replaced()["head.weight"])
    before = picture(model, handle)
    with pytest.raises(AdapterStateError) as caught:
        handle.merge()
    assert caught.value.problems == ("head.weight: it is tied to embed.weight, which a merge would change too",)
    assert picture(model, handle) == before
    handle.save(tmp_path)
    assert set(load_file(tmp_path / TENSORS)) & {f"{KEY}head.weight", f"{KEY}embed.weight"} == {f"{KEY}head.weight"}
    again = net()
    lt.attach(again, tmp_path)
    assert bits(again(IDS)) == bits(model(IDS))
    handle.detach()
    assert model.head.weight is model.embed.weight
    assert bits(model(IDS)) == bits(net()(IDS))


def test_tying_again_is_refused_or_leaves_the_bases_tensors_alone() -> None:
    model: Any = tiny("gpt2")
    handle = lt.attach(model, lt.LoraConfig(target_modules=["c_attn"], modules_to_save=["wte"]))
    move(handle)
    with pytest.raises(AttributeError, match="neither a parameter"):
        model.tie_weights()  # as resizing the embedding does; it would tie the base to the adapter's own
    with handle.disabled():
        model.tie_weights()
    assert handle.detach().lm_head.weight is model.transformer.wte.weight  # type: ignore[union-attr]


def test_keys_and_checkpoints_of_the_base_are_its_own() -> None:
    plain, (model, handle) = net(), moved(NORMS.replace(bias="all"))
    keys = list(plain.state_dict())
    assert [key for key in model.state_dict() if ".lora" not in key] == keys
    assert list(handle.base_state()) == keys
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in handle.base_state().items())
    assert dict(handle.base_parameters()).keys() == dict(plain.named_parameters()).keys()
    other = net(seed=7)
    model.load_state_dict(other.state_dict(), strict=True)
    with handle.disabled():
        assert bits(model(IDS)) == bits(other(IDS))
    again, _ = moved(NORMS.replace(bias="all"))
    again.load_state_dict(model.state_dict(), strict=True)
    assert bits(again(IDS)) == bits(model(IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_are_fp32_and_the_file_has_the_bases_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    model, handle = moved(NORMS, dtype)
    assert {own.dtype for own in handle.replaced().values()} == {torch.float32}
    assert model.blocks[0].norm.weight.dtype == model(IDS).dtype == dtype
    handle.save(tmp_path)
    assert load_file(tmp_path / TENSORS)[f"{KEY}blocks.0.norm.weight"].dtype == dtype
    again = net(dtype)
    lt.attach(again, tmp_path)
    assert bits(again(IDS)) == bits(model(IDS))
    told = lt.attach(net(dtype), NORMS, dtype=dtype)
    assert {own.dtype for own in told.replaced().values()} == {dtype}


def test_recomputation_sees_the_tensors_of_its_forward() -> None:
    ids = torch.arange(12).view(2, 6) * 17 % VOCABULARY
    grads = []
    for recomputed in (False, True):
        model: Any = tiny("llama").train()
        config = lt.LoraConfig(target_modules=["q_proj"], modules_to_save=["post_attention_layernorm"], use_dora=True)
        handle = lt.attach(model, config)
        handle.add(config, "second")
        move(handle, "second")
        if recomputed:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.disable_input_require_grads()
        loss = model(ids, labels=ids, use_cache=False).loss
        handle.activate("second")
        loss.backward()
        assert all(p.grad is None for p in handle.parameters("second"))
        grads.append([p.grad for p in handle.parameters("default")])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
