"""torch.compile and recomputed activations on an adapted model (BEHAVIOUR 16)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import loratune as lt
from loratune.errors import AdapterStateError, TargetError
from loratune.lora import TokenCounter
from tests.adapt.model import CONFIG, IDS, Net, attached, net
from tests.models import tiny


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(handle: lt.Adapters) -> list[Tensor]:
    found = [p.grad for p in handle.parameters()]
    for parameter in handle.parameters():
        parameter.grad = None
    assert all(grad is not None for grad in found)
    return [grad for grad in found if grad is not None]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_an_adapted_model_is_one_graph(backend: str) -> None:
    model, handle = attached("second")
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    for names in (("default",), ("second",), ("default", "second"), ()):
        handle.activate(*names)
        expected = model(IDS)
        found = compiled(IDS)
        assert torch.allclose(found, expected, atol=1e-6), names
        if names:
            expected.square().sum().backward()
            plain = [p.grad for name in names for p in handle.parameters(name)]
            for parameter in handle.parameters():
                parameter.grad = None
            found.square().sum().backward()
            for name_grad, p in zip(plain, (p for n in names for p in handle.parameters(n)), strict=True):
                assert name_grad is not None
                assert p.grad is not None
                assert torch.allclose(p.grad, name_grad, rtol=1e-4, atol=1e-5)
                p.grad = None


KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "bias behind B": {"lora_bias": True},
    "rows of tokens": {"trainable_token_indices": {"embed": [3, 5]}},
    "replaced": {"modules_to_save": ["norm", "head"], "bias": "all"},
    "pissa with dora": {"init_lora_weights": "pissa", "use_dora": True, "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_adapter_is_one_graph(kind: str) -> None:
    model = net()
    handle = lt.attach(model, lt.LoraConfig(r=2, target_modules=["q", "v"], **KINDS[kind]))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    for names in (("default",), ()):
        handle.activate(*names)
        expected = model(IDS)
        assert torch.allclose(compiled(IDS), expected, atol=1e-5), names
    handle.activate("default")
    model(IDS).square().sum().backward()
    plain = gradients(handle)
    compiled(IDS).square().sum().backward()
    assert len(plain) == len(handle.parameters())
    for ours, theirs in zip(gradients(handle), plain, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_trains_each_kind(kind: str) -> None:
    """What was compiled must see the values of now, not those it was traced with."""
    outputs: list[Tensor] = []
    for compile_it in (False, True):
        model = net()
        torch.manual_seed(0)
        handle = lt.attach(model, lt.LoraConfig(r=2, target_modules=["q", "v"], **KINDS[kind]))
        run: Any = torch.compile(model, backend="aot_eager", fullgraph=True) if compile_it else model
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            run(IDS).square().mean().backward()
            optimizer.step()
        outputs.append(run(IDS))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-4)
    assert not torch.allclose(outputs[0], net()(IDS), atol=1e-2)


def test_a_llama_with_counted_dropout_is_one_graph() -> None:
    model = tiny("llama").train()
    config = lt.LoraConfig(target_modules=["q_proj", "down_proj"], lora_dropout=0.3, init_lora_weights=False)
    handle = lt.attach(model, config)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = torch.arange(6).view(2, 3)
    for step in range(2):
        with handle.counting(TokenCounter(0, step, torch.arange(6).view(2, 3))):
            expected = model(ids, use_cache=False).logits
            found = compiled(ids, use_cache=False).logits
        assert torch.allclose(found, expected, atol=1e-4), step


class Recomputing(nn.Module):
    """The net with each block's activations computed again in the backward pass."""

    def __init__(self, inner: Net) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        x = self.inner.embed(ids)
        for block in self.inner.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.inner.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_recomputed_activations_give_the_same_gradients(p: float) -> None:
    model, handle = attached()
    for low_rank in handle.factors().values():
        low_rank.dropout = p
    model.train()
    with handle.counting(TokenCounter(3, 1, torch.arange(6).view(2, 3))):
        model(IDS).square().sum().backward()
        plain = gradients(handle)
        Recomputing(model)(IDS).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(handle), strict=True))


def test_a_llama_recomputes_with_a_frozen_embedding() -> None:
    model = tiny("llama").train()
    handle = lt.attach(model, lt.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    ids = torch.arange(6).view(2, 3)
    model(ids, use_cache=False).logits.square().mean().backward()
    plain = gradients(handle)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()
    model(ids, use_cache=False).logits.square().mean().backward()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(handle), strict=True))
    assert not model.get_input_embeddings().weight.requires_grad


def test_adapters_of_a_compiled_model_have_the_names_of_the_model_inside(tmp_path: Path) -> None:
    model = net()
    compiled: Any = torch.compile(model, backend="eager")
    base = compiled(IDS)
    assert lt.plan(compiled, CONFIG) == lt.plan(model, CONFIG)
    handle = lt.attach(compiled, CONFIG.replace(modules_to_save=["norm"]))
    assert lt.adapters(compiled) is lt.adapters(model) is handle
    assert torch.equal(compiled(IDS), model(IDS))
    assert not torch.equal(compiled(IDS), base)
    compiled(IDS).sum().backward()
    assert len(gradients(handle)) == len(handle.parameters())
    handle.save(tmp_path)
    names = [*load_file(tmp_path / "adapter_model.safetensors"), *handle.factors(), *handle.replaced()]
    assert not [name for name in names if "_orig_mod" in name]
    again = net()
    lt.attach(again, tmp_path)
    assert torch.equal(again(IDS), compiled(IDS))
    with pytest.raises(AdapterStateError, match="adapters already"):
        lt.attach(compiled, CONFIG)
    handle.activate()
    assert torch.equal(compiled(IDS), base)
    assert handle.detach() is model
    assert torch.equal(compiled(IDS), base)


@pytest.mark.parametrize("settings", [{}, {"target_modules": ["head"], "modules_to_save": ["blocks.0._orig_mod.norm"]}])
def test_a_part_that_is_wrapped_by_the_compiler_is_refused(settings: dict[str, Any]) -> None:
    model = net()
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")  # type: ignore[assignment]
    with pytest.raises(TargetError, match=r"blocks\.0 is wrapped by torch\.compile.*blocks\.0\.compile\(\)"):
        lt.attach(model, CONFIG.replace(**settings))
    model = net()
    model.blocks[0].compile(backend="eager")
    handle = lt.attach(model, CONFIG)
    assert "blocks.0.q" in handle.factors()
