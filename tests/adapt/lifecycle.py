"""An adapter's way on any model, from attach to detach: what must be the base's bits, and what must have changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import loratune as lt
from tests.adapt.model import bits

FILES = ("adapter_model.safetensors", "adapter_config.json")


def from_attach_to_detach(plain: Any, x: Tensor, config: lt.LoraConfig, folder: Path, *, merges: bool = True) -> None:
    """Through training, files, merging and other names; `merges` says whether the update has a place in the weight."""
    model = copy.deepcopy(plain)
    handle = lt.attach(model, config)
    base = bits(plain(x))
    assert bits(model(x)) == base, "the start is the base"
    before = {key: bits(tensor) for key, tensor in handle.base_state().items()}
    assert before.keys() == plain.state_dict().keys()
    _train(model, handle, x)
    assert {key: bits(tensor) for key, tensor in handle.base_state().items()} == before
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in handle.parameters()}
    assert handle.count().trainable == handle.plan().trainable == sum(handle.plan().sizes())
    trained = model(x)
    assert not torch.allclose(trained, plain(x), atol=1e-3)
    with handle.disabled():
        assert bits(model(x)) == base
    _through_files(plain, handle, x, bits(trained), folder)
    if merges:
        for _ in range(2):
            handle.merge()
            assert torch.allclose(model(x), trained, atol=1e-5)
            assert bits(model(x)) != base
            handle.unmerge()
            assert bits(model(x)) == bits(trained)
    handle.rename("default", "renamed")
    assert bits(model(x)) == bits(trained)
    detached = handle.detach()
    assert type(detached.layer) is type(plain.layer)
    assert {key: bits(t) for key, t in detached.state_dict().items()} == before
    assert bits(detached(x)) == base


def _train(model: Any, handle: lt.Adapters, x: Tensor) -> None:
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def _through_files(plain: Any, handle: lt.Adapters, x: Tensor, trained: bytes, folder: Path) -> None:
    """Loaded again it computes the same bits, and is written as the same bytes."""
    handle.save(folder / "first")
    again = copy.deepcopy(plain)
    other = lt.attach(again, folder / "first")
    assert bits(again(x)) == trained
    other.save(folder / "second")
    for file in FILES:
        assert (folder / "second" / file).read_bytes() == (folder / "first" / file).read_bytes()
