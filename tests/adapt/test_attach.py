"""The model stays what it was: keys, identities, types, hooks, copies; and comes back untouched."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers.pytorch_utils import Conv1D

import loratune as lt
from loratune.errors import AdapterStateError, ConfigError, TargetError
from tests.adapt.model import CONFIG, IDS, attached, bits, net, picture
from tests.models import tiny

ZERO = CONFIG.replace(init_lora_weights=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", [True, "gaussian"])
def test_a_fresh_adapter_computes_the_base_bit_for_bit(dtype: torch.dtype, init: bool | str) -> None:
    model = net(dtype)
    before = bits(model(IDS))
    lt.attach(model, CONFIG.replace(init_lora_weights=init))
    assert bits(model(IDS)) == before
    for family in ("llama", "gpt2"):
        real = tiny(family).to(dtype)
        before = bits(real(IDS).logits)
        lt.attach(real, lt.LoraConfig(target_modules="all-linear", init_lora_weights=init))
        assert bits(real(IDS).logits) == before


def test_only_a_and_b_train_and_the_base_never_changes() -> None:
    model = net()
    base = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    handle = lt.attach(model, ZERO)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2
    assert all(name.endswith((".A", ".B")) for name in trained)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.1, weight_decay=0.1)
    started = {name: bits(p) for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS).square().mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name in trained:
            assert bits(parameter) != started[name]
        else:
            assert bits(parameter) == base[name]
            assert parameter.grad is None


def test_keys_identities_types_and_ties() -> None:
    model = net()
    keys = list(model.state_dict())
    before = picture(model)
    lt.attach(model, CONFIG)
    assert [key for key in model.state_dict() if ".lora." not in key] == keys
    after = picture(model)
    for path, (identity, kind, _) in before["modules"].items():
        assert after["modules"][path][0] == identity
        assert issubclass(after["modules"][path][1], kind)
    for name, (identity, _) in before["parameters"].items():
        assert after["parameters"][name][0] == identity
    assert model.head.weight is model.embed.weight
    block: Any = model.blocks[0]
    assert isinstance(block.q, nn.Linear)
    assert isinstance(block.v, Conv1D)
    assert block.q.weight.shape == (6, 6)
    assert (block.q.in_features, block.v.nf) == (6, 6)


def test_a_checkpoint_of_the_base_loads() -> None:
    model, _ = attached()
    other = net(seed=7)
    assert not model.load_state_dict(other.state_dict(), strict=True).missing_keys
    assert torch.equal(model.blocks[0].q.weight, other.blocks[0].q.weight)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.q\.weight"):
        model.load_state_dict({k: v for k, v in other.state_dict().items() if k != "blocks.0.q.weight"})
    again, _ = attached()
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again(IDS), model(IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_detach_gives_back_the_base(dtype: torch.dtype) -> None:
    model = net(dtype)
    before, attributes = picture(model), set(vars(model))
    handle = lt.attach(model, CONFIG)
    assert bits(model(IDS)) != before["output"]
    model.blocks[0].norm.weight.requires_grad_(True)  # beside the adapter
    model.embed.weight.requires_grad_(True)
    assert handle.detach() is model
    assert picture(model) == before
    assert set(vars(model)) == attributes
    for block in model.blocks:
        assert not {"lora", "lora_state", "lora_index"} & {*vars(block.q), *block.q._modules}
    lt.attach(model, CONFIG).detach()
    assert picture(model) == before


def test_detach_from_the_merged_state() -> None:
    model = net(torch.bfloat16)
    before = picture(model)
    handle = lt.attach(model, CONFIG)
    handle.merge()
    handle.detach()
    assert picture(model) == before


def test_detach_inside_a_disabled_block() -> None:
    model, handle = attached()
    before = picture(net())
    with handle.disabled():
        handle.detach()
    assert handle.active == ()
    assert picture(model)["output"] == before["output"]


def test_removed_modules_do_not_stop_detach() -> None:
    model, handle = attached()
    model.blocks[1].norm = nn.Identity()  # type: ignore[assignment]
    handle.detach()
    assert type(model.blocks[0].q) is nn.Linear


# -- refusals leave everything as it was -------------------------------------------------------------------------------


def test_an_attached_model_refuses_another_attach() -> None:
    model, handle = attached()
    before = picture(model, handle)
    with pytest.raises(AdapterStateError, match="has adapters already"):
        lt.attach(model, CONFIG)
    assert picture(model, handle) == before
    assert lt.adapters(model) is handle
    handle.detach()
    with pytest.raises(AdapterStateError, match="has no adapters"):
        lt.adapters(model)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "forward", "training", "_modules", "pop"])
def test_names_that_no_adapter_can_have(name: str) -> None:
    model = net()
    before = picture(model)
    with pytest.raises(AdapterStateError, match="cannot name an adapter"):
        lt.attach(model, CONFIG, name=name)
    assert picture(model) == before


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_a_dtype_that_cannot_train(dtype: torch.dtype, tmp_path: Path) -> None:
    attached()[1].save(tmp_path)
    for what in (CONFIG, tmp_path):
        model = net()
        before = picture(model)
        with pytest.raises(AdapterStateError, match="cannot be torch"):
            lt.attach(model, what, dtype=dtype)
        assert picture(model) == before


def test_a_typo_in_the_targets() -> None:
    model = net()
    before = picture(model)
    with pytest.raises(TargetError, match="'w' matches no module"):
        lt.attach(model, CONFIG.replace(target_modules=["q", "w"]))
    assert picture(model) == before


# -- dtypes and devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_masters_are_fp32_unless_told(dtype: torch.dtype | None) -> None:
    model = net(torch.bfloat16)
    handle = lt.attach(model, CONFIG, dtype=dtype)
    assert {p.dtype for p in handle.parameters()} == {dtype or torch.float32}
    assert model(IDS).dtype == torch.bfloat16


def test_a_saved_dtype_is_kept_unless_it_trains_or_is_told(tmp_path: Path) -> None:
    lt.attach(net(), CONFIG, dtype=torch.bfloat16).save(tmp_path)
    kept = lt.attach(net(), tmp_path)
    kept.unfreeze("default")
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        told = lt.attach(net(), tmp_path, trainable=True, dtype=dtype)
        assert {p.dtype for p in told.parameters()} == {expected}, "what trains has fp32 masters unless told"


def test_the_meta_device() -> None:
    with torch.device("meta"):
        model = tiny_shapes()
    handle = lt.attach(model, lt.LoraConfig(target_modules="all-linear"))
    assert all(p.is_meta for p in handle.parameters())
    assert handle.count().trainable == 8 * (3 + 5)


def tiny_shapes() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5))


# -- copies and hooks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_copy_is_a_model_with_a_handle_of_its_own(how: str, merged: bool) -> None:
    model, handle = attached("second")
    if merged:
        handle.merge()
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    theirs = lt.adapters(other)
    assert theirs is not handle
    assert theirs.model is other
    assert torch.equal(other(IDS), model(IDS))
    assert other.head.weight is other.embed.weight
    assert type(other.blocks[0].q) is type(model.blocks[0].q)
    before = picture(model, handle)
    if merged:
        theirs.unmerge()
    theirs.activate("second")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    theirs.rename("default", "renamed")
    assert picture(model, handle) == before
    theirs.activate()
    with_base = bits(other(IDS))
    theirs.detach()
    assert bits(other(IDS)) == with_base == bits(net()(IDS))


def test_torch_save_keeps_the_adapters(tmp_path: Path) -> None:
    model, _ = attached()
    torch.save(model, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(again(IDS), model(IDS))
    assert lt.adapters(again).active == ("default",)


def test_hooks_of_the_users_are_kept() -> None:
    model = net()
    calls: list[str] = []
    layer = model.blocks[0].q
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    handle = lt.attach(model, CONFIG)
    model(IDS).sum().backward()
    assert calls == ["forward", "backward"]
    handle.detach()
    model(IDS)
    assert calls == ["forward", "backward", "forward"]


class Counting(ModelHook):
    calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


def adapted_differs(model: nn.Module, handle: lt.Adapters) -> bool:
    """Whether the adapter takes part, and `disabled` takes it out."""
    with handle.disabled():
        base = bits(model(IDS))
    return bits(model(IDS)) != base == bits(net()(IDS))


def test_accelerates_hook_before_attach() -> None:
    model, hook = net(), Counting()
    for block in model.blocks:
        add_hook_to_module(block.q, hook)
        add_hook_to_module(block.v, hook)
    expected = attached()[0](IDS)
    handle = lt.attach(model, CONFIG)
    assert torch.equal(model(IDS), expected)
    assert hook.calls == 4
    assert adapted_differs(model, handle)
    handle.detach()
    assert bits(model(IDS)) == bits(net()(IDS))
    assert hook.calls == 4 * 4
    remove_hook_from_module(model, recurse=True)
    assert bits(model(IDS)) == bits(net()(IDS))


def test_accelerates_hook_comes_and_goes_between() -> None:
    model, hook = net(), Counting()
    layers = [layer for block in model.blocks for layer in (block.q, block.v)]
    for layer in layers:
        add_hook_to_module(layer, hook)
    handle = lt.attach(model, CONFIG)
    expected = bits(model(IDS))
    remove_hook_from_module(model, recurse=True)
    assert bits(model(IDS)) == expected, "a removed hook leaves the bound forward on the instance"
    assert adapted_differs(model, handle)
    for layer in layers:
        add_hook_to_module(layer, hook)
    handle.detach()
    assert bits(model(IDS)) == bits(net()(IDS))
    remove_hook_from_module(model, recurse=True)
    handle = lt.attach(model, CONFIG)
    assert adapted_differs(model, handle)
    remove_hook_from_module(model, recurse=True)
    handle.detach()
    assert bits(model(IDS)) == bits(net()(IDS))


def test_a_foreign_forward_under_accelerates_hook_is_refused() -> None:
    model = net()
    layer = model.blocks[0].q
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 1
    add_hook_to_module(layer, Counting())
    before = picture(model)
    with pytest.raises(TargetError, match=r"blocks\.0\.q: its forward is replaced"):
        lt.attach(model, CONFIG)
    assert picture(model) == before


def test_training_mode_follows_the_module() -> None:
    model = net()
    handle = lt.attach(model, CONFIG.replace(lora_dropout=0.5))
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(IDS), model(IDS))
    model.train()
    assert not torch.equal(model(IDS), model(IDS))
    handle.add(CONFIG, "second")
    assert all(low_rank.training for low_rank in handle.factors("second").values())


class _HasLora(nn.Module):
    """A base with a module of its own called `lora`."""

    def __init__(self) -> None:
        super().__init__()
        self.lora = nn.Linear(4, 4)
        self.proj = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.proj(self.lora(x))
        return out


def test_a_base_may_use_the_word_itself() -> None:
    """Adapters' tensors are found by where they stand, not by their name."""
    model = _HasLora()
    keys = set(model.state_dict())
    lora = lt.attach(model, lt.LoraConfig(r=2, target_modules="all-linear"))
    assert {target.path for target in lora.plan().targets} == {"lora", "proj"}
    assert set(lora.base_state()) == keys
    assert lora.plan().base_parameters == 40
    assert sum(parameter.numel() for _, parameter in lora.base_parameters()) == 40


def test_a_target_whose_place_is_taken_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].lora = nn.Identity()
    with pytest.raises(TargetError, match="called 'lora'"):
        lt.attach(model, lt.LoraConfig(r=2, target_modules="all-linear"))


def test_second_detach_and_foreign_arguments_are_typed_errors() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    lora = lt.attach(model, lt.LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(AdapterStateError, match="already"):
        lt.attach(model[0], lt.LoraConfig(r=2, target_modules="all-linear"))
    lora.detach()
    with pytest.raises(AdapterStateError, match="detached"):
        lora.detach()
    with pytest.raises(ConfigError, match="dict"):
        lt.attach(model, {"r": 2})
