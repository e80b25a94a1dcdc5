"""Merging what is more than s · B A: DoRA, biases, modules trained whole; one rounding, all or nothing (22 to 26)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import loratune as lt
from loratune.errors import AdapterFileError, AdapterStateError, MergedError
from tests.adapt.model import IDS, Net, bits, net, picture
from tests.models import tiny
from tests.oracle import lora_reference as oracle

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
BASE = lt.LoraConfig(r=2, target_modules=["q", "v"], lora_alpha=3)
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora with rslora": {"use_dora": True, "use_rslora": True},
    "bias behind B": {"lora_bias": True},
    "biases": {"bias": "all"},
    "norms": {"modules_to_save": ["norm"]},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa with dora": {"init_lora_weights": "pissa", "use_dora": True},
    "all at once": {"init_lora_weights": "olora", "use_dora": True, "bias": "all", "modules_to_save": ["norm"]},
}


def moved(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Net, lt.Adapters]:
    model = net(dtype)
    handle = lt.attach(model, BASE.replace(**KINDS[kind]))
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=dice) * 0.3)
    return model, handle


# -- the reference, number by number in float64 ------------------------------------------------------------------------


def weight_of(low_rank: Any, W: oracle.Array) -> oracle.Array:
    """The merged weight (out, in), not rounded: W + s (B A - B₀ A₀), each row brought to its length."""
    A, B = oracle.exact(low_rank.A), oracle.exact(low_rank.B)
    if low_rank.A0 is not None:
        # (B - B₀) A + B₀ (A - A₀)
        A0, B0 = oracle.exact(low_rank.A0), oracle.exact(low_rank.B0)
        A, B = np.concatenate([A, A - A0]), np.concatenate([B - B0, B0], axis=1)
    total: oracle.Array = W + oracle.dense(oracle.Update(A, B, low_rank.scale))
    if low_rank.magnitude is not None:
        lengths = np.array([np.sqrt(sum(float(w) ** 2 for w in row)) for row in total])
        total = total * (oracle.exact(low_rank.magnitude) / lengths)[:, None]
    return total


def expected_tensors(model: Net, handle: lt.Adapters, stored: str) -> dict[str, oracle.Array]:
    """Every tensor that a merge changes, as it must be afterwards."""
    found = {name: oracle.rounded(oracle.exact(own), stored) for name, own in handle.replaced().items()}
    for path, low_rank in handle.factors().items():
        weight = oracle.exact(model.get_submodule(path).weight)
        W = weight if path.endswith("q") else weight.T
        merged = oracle.rounded(weight_of(low_rank, W), stored)
        found[f"{path}.weight"] = merged if path.endswith("q") else merged.T
        if low_rank.bias is not None:
            bias = oracle.exact(model.get_submodule(path).bias) + oracle.exact(low_rank.bias) * low_rank.scale
            found[f"{path}.bias"] = oracle.rounded(bias, stored)
    return found


def changed(model: Net, dtype: torch.dtype) -> set[str]:
    plain = net(dtype)
    return {name for name, p in plain.named_parameters() if not torch.equal(p, own_of(model, name))}


def own_of(model: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    found = model.get_submodule(path)._parameters[last]
    assert found is not None
    return found


@pytest.mark.parametrize("stored", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("kind", KINDS)
def test_fp64_merging_is_the_reference_to_the_bit(kind: str, stored: torch.dtype) -> None:
    for seed in range(3):
        model, handle = moved(kind, stored, seed)
        expected = expected_tensors(model, handle, NAMES[stored])
        handle.merge(dtype=torch.float64)
        for name, value in expected.items():
            assert np.array_equal(oracle.exact(own_of(model, name)), value), name
        assert changed(model, stored) == set(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_merging_rounds_to_bf16_once(kind: str) -> None:
    model, handle = moved(kind, torch.bfloat16)
    expected = expected_tensors(model, handle, "bfloat16")
    handle.merge()
    for name, value in expected.items():
        found = oracle.exact(own_of(model, name))
        # What is computed in fp32 meets another neighbour only where it lies within fp32's error of the middle.
        assert (found != value).mean() < 0.03, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_output_is_the_unmerged_one(kind: str, dtype: torch.dtype) -> None:
    model, handle = moved(kind)
    unmerged, before = model(IDS), picture(model, handle)
    handle.merge(dtype=dtype)
    assert (model(IDS) - unmerged).norm() < 1e-5 * unmerged.norm()
    handle.unmerge()
    assert picture(model, handle) == before


def test_several_at_once_are_the_sum_of_their_deltas() -> None:
    model, handle = moved("dora")
    handle.add(BASE.replace(lora_bias=True, target_modules=["q"], init_lora_weights=False), "second")
    handle.activate("default", "second")
    unmerged, before = model(IDS), picture(model, handle)
    handle.merge()
    assert (model(IDS) - unmerged).norm() < 1e-5 * unmerged.norm()
    handle.unmerge()
    assert picture(model, handle) == before


def test_a_bias_behind_b_is_rounded_once_from_fp64() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2)).bfloat16()
    handle = lt.attach(model, lt.LoraConfig(r=1, lora_alpha=1, target_modules=["0"], lora_bias=True))
    with torch.no_grad():
        model[0].bias.fill_(1.0)
        # A little above the middle of two neighbours in bf16, by less than fp32 can tell beside 1.
        handle.parameters()[2].fill_(2**-8 * (1 + 2**-23))
    handle.merge(dtype=torch.float64)
    assert model[0].bias.tolist() == [1 + 2**-7] * 2


def test_an_own_bias_and_one_behind_b_are_rounded_together() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2)).bfloat16()
    config = lt.LoraConfig(r=1, lora_alpha=1, target_modules=["0"], lora_bias=True, bias="lora_only")
    handle = lt.attach(model, config)
    with torch.no_grad():
        handle.replaced()["0.bias"].fill_(1 + 2**-9)
        handle.parameters()[2].fill_(2**-9 + 2**-10)
    handle.merge()
    assert model[0].bias.tolist() == [1 + 2**-7] * 2


@pytest.mark.parametrize("stored", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("path", ["blocks.0.q", "blocks.0.v"])  # stored (out, in), and (in, out)
def test_a_delta_is_added_to_the_weight_that_another_adapter_puts_there(
    path: str, dtype: torch.dtype, stored: torch.dtype
) -> None:
    model = net(stored)
    handle = lt.attach(model, BASE.replace(target_modules=[path], init_lora_weights=False))
    handle.add(lt.LoraConfig(r=2, target_modules=["blocks.1.v"], modules_to_save=[path]), "whole")
    handle.activate("default", "whole")
    own = handle.replaced("whole")[f"{path}.weight"]
    with torch.no_grad():
        own.add_(torch.randn(own.shape, generator=torch.Generator().manual_seed(0)))
    unmerged, before = model(IDS), picture(model, handle)
    W = oracle.exact(own)
    expected = weight_of(handle.factors("default")[path], W if path.endswith("q") else W.T)
    handle.activate("default", "whole")
    handle.merge(dtype=dtype)
    found = oracle.exact(own_of(model, f"{path}.weight"))
    right = oracle.rounded(expected, NAMES[stored])
    right = right if path.endswith("q") else right.T
    if dtype == torch.float64:
        assert np.array_equal(found, right)
    else:
        assert np.allclose(found, right, rtol=2**-7 if stored != torch.float32 else 1e-5, atol=1e-6)
    if stored == torch.float32:
        assert (model(IDS) - unmerged).norm() < 1e-5 * unmerged.norm()
    handle.unmerge()
    assert picture(model, handle) == before


def test_dora_on_a_weight_that_another_adapter_has_its_own_of_is_refused() -> None:
    model, handle = moved("dora")
    handle.add(lt.LoraConfig(r=2, target_modules=["head"], modules_to_save=["blocks.1.q"]), "whole")
    before = picture(model, handle)
    with pytest.raises(AdapterStateError) as caught:
        handle.activate("default", "whole")
    assert caught.value.problems == (
        "'default' is DoRA, which brings the base's rows to a length, and 'whole' has its own blocks.1.q.weight",
    )
    assert picture(model, handle) == before


# -- refused, and nothing changed --------------------------------------------------------------------------------------


def test_a_bias_without_a_place_is_refused() -> None:
    model: Any = tiny("llama")
    handle = lt.attach(model, lt.LoraConfig(target_modules=["q_proj"], lora_bias=True, init_lora_weights=False))
    before = picture(model, handle)
    for keep_base in (True, False):
        with pytest.raises(AdapterStateError) as caught:
            handle.merge(keep_base=keep_base)
        why = "the adapter has a bias behind B, and this module has none to add it to"
        assert caught.value.problems == tuple(f"model.layers.{i}.self_attn.q_proj.bias: {why}" for i in (0, 1))
        assert caught.value.hint == "nothing was merged"
        assert picture(model, handle) == before


def beside(handle: lt.Adapters, name: str) -> Tensor:
    found = getattr(handle.factors()["blocks.1.v"], name)
    assert isinstance(found, Tensor)
    return found


# What can be broken, in which kind of adapter → the tensor that would not be finite.
BROKEN: dict[str, tuple[str, Callable[[lt.Adapters], Tensor], str]] = {
    "magnitude": ("dora", lambda h: beside(h, "magnitude"), "blocks.1.v.weight"),
    "bias behind B": ("bias behind B", lambda h: beside(h, "bias"), "blocks.1.v.bias"),
    "a bias": ("biases", lambda h: h.replaced()["blocks.1.norm.bias"], "blocks.1.norm.bias"),
    "a norm": ("norms", lambda h: h.replaced()["blocks.0.norm.weight"], "blocks.0.norm.weight"),
    "a start": ("pissa", lambda h: h.factors()["blocks.0.q"].A, "blocks.0.q.weight"),
}


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("what", BROKEN)
def test_what_is_not_finite_is_neither_merged_nor_saved(tmp_path: Path, what: str, keep_base: bool) -> None:
    kind, broken, name = BROKEN[what]
    model, handle = moved(kind)
    with torch.no_grad():
        broken(handle).view(-1)[0] = torch.nan
    before = picture(model, handle)
    with pytest.raises(AdapterStateError) as caught:
        handle.merge(keep_base=keep_base)
    assert caught.value.problems == (f"{name}: the merged tensor would hold NaN or infinity",)
    assert picture(model, handle) == before
    with pytest.raises(AdapterFileError, match="holds NaN or infinity") as unsaved:
        handle.save(tmp_path / "never")
    assert unsaved.value.hint == "nothing was written"
    assert not (tmp_path / "never").exists()


def test_every_reason_is_given_at_once() -> None:
    model = net()
    handle = lt.attach(model, BASE.replace(target_modules=["q", "head"], lora_bias=True, modules_to_save=["norm"]))
    with torch.no_grad():
        handle.replaced()["blocks.0.norm.bias"][0] = torch.inf
    before = picture(model, handle)
    with pytest.raises(AdapterStateError) as caught:
        handle.merge()
    assert {problem.split(":")[0] for problem in caught.value.problems} == {
        "head.weight",
        "head.bias",
        "blocks.0.norm.bias",
    }
    assert picture(model, handle) == before


# -- leaving merged ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("kind", ["dora", "all at once", "bias behind B"])
def test_detached_merged_is_a_plain_model_with_the_merged_weights(kind: str, keep_base: bool) -> None:
    plain = net()
    model, handle = moved(kind)
    handle.merge(keep_base=keep_base)
    merged = {name: bits(tensor) for name, tensor in handle.base_state().items()}
    expected = bits(model(IDS))
    assert handle.detach(merged=True) is model
    assert bits(model(IDS)) == expected != bits(plain(IDS))
    assert {name: bits(tensor) for name, tensor in model.state_dict().items()} == merged
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == [
        (name, p.requires_grad) for name, p in plain.named_parameters()
    ]
    assert model.head.weight is model.embed.weight
    with pytest.raises(AdapterStateError, match="detached already"):
        handle.detach(merged=True)


def test_detaching_merged_needs_a_merge() -> None:
    model, handle = moved("dora")
    before = picture(model, handle)
    with pytest.raises(AdapterStateError, match="nothing is merged") as caught:
        handle.detach(merged=True)
    assert caught.value.hint == "merge first, or detach without merged=True"
    assert picture(model, handle) == before


def test_without_the_base_only_the_merged_model_is_left() -> None:
    model, handle = moved("all at once")
    handle.merge(keep_base=False)
    before = picture(model, handle)
    for act in (handle.unmerge, handle.detach):
        with pytest.raises(MergedError, match="cannot be undone"):
            act()
        assert picture(model, handle) == before


def test_the_merged_model_shares_nothing_with_the_adapter() -> None:
    model, handle = moved("all at once")
    handle.merge()
    before = bits(model(IDS))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.zero_()
    assert bits(model(IDS)) == before
