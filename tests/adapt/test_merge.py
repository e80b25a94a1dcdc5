"""Merging: one rounding, exact return, all or nothing (BEHAVIOUR 22 to 24, 26, 27)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import loratune as lt
from loratune.errors import AdapterStateError, MergedError
from tests.adapt.model import CONFIG, IDS, Net, attached, bits, net, picture
from tests.models import tiny
from tests.oracle import lora_reference as oracle

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def updates(handle: lt.Adapters, path: str) -> list[oracle.Update]:
    found = [handle.factors(name)[path] for name in handle.active if path in handle.factors(name)]
    return [oracle.Update(oracle.exact(one.A), oracle.exact(one.B), one.scale) for one in found]


@pytest.mark.parametrize("stored", NAMES, ids=NAMES.values())
@settings(derandomize=True, deadline=None, max_examples=12, database=None)
@given(seed=st.integers(0, 2**32), several=st.booleans(), alpha=st.floats(0.01, 8))
def test_fp64_merging_is_the_reference_to_the_bit(stored: torch.dtype, seed: int, several: bool, alpha: float) -> None:
    torch.manual_seed(seed)
    model = net(stored)
    config = CONFIG.replace(lora_alpha=alpha)
    handle = lt.attach(model, config)
    if several:
        handle.add(config.replace(r=3, target_modules=["q", "blocks.0.v"]), "second")
        handle.activate("default", "second")
    expected = {}
    for path in handle.factors("default"):
        weight = model.get_submodule(path).weight
        W = oracle.exact(weight)
        W = W if path.endswith("q") else W.T
        expected[path] = oracle.merged(W, updates(handle, path), NAMES[stored])
    handle.merge(dtype=torch.float64)
    for path, value in expected.items():
        ours = oracle.exact(model.get_submodule(path).weight)
        ours = ours if path.endswith("q") else ours.T
        assert np.array_equal(ours, value), path


def test_fp32_merging_rounds_once() -> None:
    model, handle = attached("second", dtype=torch.bfloat16)
    handle.activate("default", "second")
    expected = {}
    for path in handle.factors("default"):
        layer = model.get_submodule(path)
        zeros = torch.zeros(6, 6)
        delta = sum(handle.factors(name)[path].delta(zeros) for name in handle.active)
        assert isinstance(delta, torch.Tensor)
        expected[path] = (layer.weight.float() + (delta if path.endswith("q") else delta.T)).bfloat16()
    handle.merge()
    for path, value in expected.items():
        # The sum of two fp32 deltas may be formed in either order; one rounding leaves at most that.
        assert (model.get_submodule(path).weight != value).float().mean() < 0.02


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_output_is_the_unmerged_one(family: str) -> None:
    model = tiny(family)
    config = lt.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_alpha=2)
    handle = lt.attach(model, config)
    with handle.disabled():
        base = model(IDS).logits
    unmerged = model(IDS).logits
    handle.merge()
    merged = model(IDS).logits
    assert (unmerged - base).norm() > 0.05 * base.norm()
    assert (merged - unmerged).norm() < 1e-5 * unmerged.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_twenty_cycles_change_no_bit(dtype: torch.dtype) -> None:
    model, handle = attached("second", dtype=dtype)
    handle.activate("second", "default")
    before = picture(model, handle)
    merged = set()
    for cycle in range(20):
        handle.activate("second", "default") if cycle % 2 == 0 else handle.activate("default")
        active = handle.active
        handle.merge(dtype=torch.float64 if cycle % 4 == 0 else torch.float32)
        merged.add(bits(model.blocks[0].q.weight))
        handle.unmerge()
        assert handle.active == active
    handle.activate("second", "default")
    assert picture(model, handle) == before
    assert len(merged) >= 2, "merging did something"


def test_the_weights_parameter_stays_itself() -> None:
    model, handle = attached()
    identities = [id(p) for p in model.parameters()]
    trains = [p.requires_grad for p in model.parameters()]
    handle.merge()
    assert [id(p) for p in model.parameters()] == identities
    assert [p.requires_grad for p in model.parameters()] == trains
    keys = [key for key in model.state_dict() if ".lora." not in key]
    assert keys == list(net().state_dict())


def test_without_the_base_there_is_no_way_back() -> None:
    model, handle = attached(dtype=torch.bfloat16)
    other, other_handle = attached(dtype=torch.bfloat16)
    storage = model.blocks[0].q.weight.data_ptr()
    handle.merge(keep_base=False)
    other_handle.merge()
    assert bits(model(IDS)) == bits(other(IDS))
    assert model.blocks[0].q.weight.data_ptr() == storage, "in place, no second copy"
    before = picture(model, handle)
    for act in (handle.unmerge, handle.detach):
        with pytest.raises(MergedError, match="cannot be undone") as caught:
            act()
        assert "keep_base=True" in caught.value.hint
        assert picture(model, handle) == before


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("where", ["A", "B"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_bad_delta_merges_nothing(keep_base: bool, where: str, bad: float) -> None:
    model, handle = attached()
    (*_, path) = handle.factors()
    with torch.no_grad():
        getattr(handle.factors()[path], where)[0, 0] = bad
    with handle.disabled():
        before = picture(model)
    with pytest.raises(AdapterStateError, match="NaN or infinity") as caught:
        handle.merge(keep_base=keep_base)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [f"{path}.weight"]
    assert (handle.merged, handle.active) == (False, ("default",))
    with handle.disabled():
        assert picture(model) == before


def test_a_sum_beyond_the_format_merges_nothing() -> None:
    model, handle = attached(dtype=torch.float16)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.fill_(1000.0)
    before = picture(model, handle)
    with pytest.raises(AdapterStateError, match="NaN or infinity"):
        handle.merge()
    assert picture(model, handle) == before


@pytest.mark.parametrize("target", ["head", "all-linear"])
def test_a_tied_weight_is_refused_with_the_reason(target: str) -> None:
    model = net()
    config = CONFIG.replace(target_modules=target if target == "all-linear" else [target])
    handle = lt.attach(model, config)
    before = picture(model, handle)
    with pytest.raises(AdapterStateError) as caught:
        handle.merge()
    assert caught.value.problems == ("head.weight: it is tied to embed.weight, which a merge would change too",)
    assert picture(model, handle) == before
    assert model.head.weight is model.embed.weight


def test_ties_elsewhere_survive_a_merge() -> None:
    model, handle = attached()
    handle.merge()
    assert model.head.weight is model.embed.weight
    handle.unmerge()
    assert model.head.weight is model.embed.weight


def test_two_adapted_twins_are_refused() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    handle = lt.attach(model, lt.LoraConfig(target_modules=["a", "b"]))
    with pytest.raises(AdapterStateError) as caught:
        handle.merge()
    assert len(caught.value.problems) == 2


def test_a_merged_adapter_counts_once() -> None:
    """While merged, the layers must not add the delta that the weights hold already."""
    model, handle = attached()
    unmerged = model(IDS)
    handle.merge()
    assert torch.allclose(model(IDS), unmerged, atol=1e-5)
    assert handle.active == ("default",)


def test_nothing_merges_by_itself() -> None:
    model, handle = attached("second")
    weights = {path: bits(model.get_submodule(path).weight) for path in handle.factors("default")}
    for mode in (True, False):
        model.train(mode)
        model(IDS).sum().backward()
        handle.activate("second")
        with handle.disabled():
            model(IDS)
        handle.activate("default")
    assert {path: bits(model.get_submodule(path).weight) for path in weights} == weights
    assert not handle.merged


def test_a_model_that_moved_while_merged() -> None:
    model, handle = attached()
    handle.merge()
    model.double()
    handle.unmerge()
    assert model.blocks[0].q.weight.dtype == torch.float64
    assert torch.equal(model.blocks[0].q.weight, Net.get_submodule(net(), "blocks.0.q").weight.double())
    assert model(IDS).dtype == torch.float64
