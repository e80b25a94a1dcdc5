"""Copies of an adapted model, whatever its adapters hold, are models of their own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loratune as lt
from tests.adapt.model import IDS, Net, bits, net, picture
from tests.models import tiny

BASE = lt.LoraConfig(r=2, target_modules=["q", "v"])
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "bias behind B": {"lora_bias": True},
    "replaced": {"modules_to_save": ["norm", "head"], "bias": "all"},
    "pissa": {"init_lora_weights": "pissa"},
    "replaced targets": {"bias": "lora_only", "use_dora": True},
}


def with_all_kinds() -> tuple[Net, lt.Adapters]:
    model = net()
    handle = lt.attach(model, BASE.replace(target_modules=["q"]), name="plain")
    for name, settings in KINDS.items():
        handle.add(BASE.replace(**settings), name)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    with handle.rows(["plain", "bias behind B"]):
        model(IDS)  # fills what is kept between two such blocks
    return model, handle


def copied(model: nn.Module, how: str, folder: Path) -> Any:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    torch.save(model, folder / "whole.pt")
    return torch.load(folder / "whole.pt", weights_only=False)


def outputs(model: nn.Module, handle: lt.Adapters) -> dict[str, bytes]:
    found = {}
    for name in handle.names:
        handle.activate(name)
        found[name] = bits(model(IDS))
    handle.activate("plain")
    with handle.rows(["plain", "bias behind B"]):
        found["rows"] = bits(model(IDS))
    return found


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_has_every_kind_of_adapter_of_its_own(tmp_path: Path, how: str) -> None:
    model, handle = with_all_kinds()
    expected = outputs(model, handle)
    assert len(set(expected.values())) == len(KINDS) + 2
    other = copied(model, how, tmp_path)
    theirs = lt.adapters(other)
    assert theirs.model is other
    assert outputs(other, theirs) == expected
    assert other.head._parameters["weight"] is other.embed.weight
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    before = picture(model, handle)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    theirs.rename("dora", "renamed")
    theirs.remove("replaced")
    theirs.merge()
    assert picture(model, handle) == before
    theirs.detach()
    assert bits(other(IDS)) == bits(net()(IDS))
    assert picture(model, handle) == before
    assert outputs(model, handle) == expected


def test_a_copy_of_a_merged_model_unmerges_on_its_own() -> None:
    model, handle = with_all_kinds()
    handle.activate("replaced targets")
    unmerged = bits(model(IDS))
    handle.merge()
    other = copy.deepcopy(model)
    before = picture(model, handle)
    lt.adapters(other).unmerge()
    assert bits(other(IDS)) == unmerged
    assert picture(model, handle) == before


def test_a_copy_of_transformers_model_is_whole() -> None:
    model = tiny("llama")
    config = lt.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"], use_dora=True)
    handle = lt.attach(model, config)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1)
    for how in ("deepcopy", "pickle"):
        other = copied(model, how, Path())
        assert torch.equal(other(IDS).logits, model(IDS).logits)
        lt.adapters(other).detach()
        assert torch.equal(other(IDS).logits, tiny("llama")(IDS).logits)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_made_while_disabled_is_the_base_until_told(how: str) -> None:
    model, handle = with_all_kinds()
    handle.activate("dora")
    adapted = bits(model(IDS))
    with handle.disabled():
        other = copied(model, how, Path())
    assert bits(model(IDS)) == adapted
    theirs = lt.adapters(other)
    assert (bits(other(IDS)), theirs.active) == (bits(net()(IDS)), ())
    theirs.remove("pissa")
    theirs.activate("dora")
    assert bits(other(IDS)) == adapted
    theirs.merge()
    theirs.unmerge()
    assert bits(other(IDS)) == adapted


def test_a_copy_made_while_rows_have_their_own_takes_other_batches() -> None:
    model, handle = with_all_kinds()
    with handle.rows(["plain", "bias behind B"]):
        other = copy.deepcopy(model)
        mixed = bits(model(IDS))
        assert bits(other(IDS[:1])) == bits(net()(IDS[:1]))
        assert bits(model(IDS)) == mixed
    with lt.adapters(other).rows(["plain", "bias behind B"]):
        assert bits(other(IDS)) == mixed
