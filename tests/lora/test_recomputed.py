"""Activation checkpointing: the second forward pass has the adapters, rows and masks of the first (BEHAVIOUR 16)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import loratune as lt
from loratune.lora import (
    AdapterState,
    Recomputed,
    TokenCounter,
    adapt_in_place,
    base_modules,
    bind_recomputation,
    can_be_recomputed,
    unbind_recomputation,
)
from loratune.quant import frozen_weight
from tests.lora.cases import Adapter, low_rank_of
from tests.models import tiny

IDS = torch.tensor([[5, 9, 13, 8, 30], [7, 7, 21, 3, 11]])
COUNTER = TokenCounter(3, 4, torch.arange(10).view(2, 5))
Gradients = dict[str, Tensor]


def attached(*, reentrant: bool | None = None, first: bool = False, p: float = 0.0) -> tuple[Any, lt.Adapters]:
    """A tiny llama with adapters a and b that change its output; checkpointed unless `reentrant` is None."""
    model = tiny("llama")
    if reentrant is not None and first:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(0)
    config = lt.LoraConfig(target_modules="all-linear", r=4, lora_dropout=p, init_lora_weights=False)
    handle = lt.attach(model, config, name="a")
    handle.add(config, "b")
    if reentrant is not None and not first:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    return model.train(), handle


def to_b(handle: lt.Adapters) -> Any:
    handle.activate("b")
    return nullcontext()


BETWEEN: dict[str, Callable[[Any], Any]] = {
    "nothing": nullcontext,
    "another adapter": to_b,
    "none": lambda handle: handle.disabled(),
    "both, counting elsewhere": lambda handle: handle.counting(TokenCounter(9, 9, COUNTER.tokens)),
}


def gradients(model: Any, handle: lt.Adapters, between: str) -> Gradients:
    with handle.counting(COUNTER):
        loss = model(IDS, use_cache=False).logits.float().square().mean()
    with BETWEEN[between](handle):
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(one: Gradients, other: Gradients) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(gradient, other[name], rtol=1e-5, atol=1e-7) for name, gradient in one.items()
    )


@pytest.fixture(scope="module")
def expected() -> dict[float, Gradients]:
    """Without checkpointing, by probability of dropout."""
    found = {}
    for p in (0.0, 0.5):
        model, handle = attached(p=p)
        found[p] = gradients(model, handle, "nothing")
        assert found[p]
        assert all(".a." in name for name in found[p])
        assert all(gradient.any() for gradient in found[p].values())
    return found


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("first", [False, True], ids=["enabled after attaching", "enabled before attaching"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_those_without_checkpointing(
    expected: dict[float, Gradients], reentrant: bool, first: bool, between: str, p: float
) -> None:
    model, handle = attached(reentrant=reentrant, first=first, p=p)
    assert same(gradients(model, handle, between), expected[p])


@pytest.mark.parametrize("between", ["another adapter", "none"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_without_the_mixin_they_are_not(expected: dict[float, Gradients], reentrant: bool, between: str) -> None:
    model, handle = attached(reentrant=reentrant)
    for _, module in list(base_modules(model)):
        if isinstance(module, Recomputed):
            unbind_recomputation(module)
    with suppress(RuntimeError):  # torch may see another graph
        assert not same(gradients(model, handle, between), expected[0.0])


def test_a_name_changed_before_the_backward_pass_loses_no_gradient() -> None:
    model, handle = attached(reentrant=True)
    loss = model(IDS, use_cache=False).logits.float().square().mean()
    handle.rename("a", "z")
    with suppress(RuntimeError):  # a refusal would do
        loss.backward()
        assert all(parameter.grad is not None for parameter in handle.parameters("z"))


def test_every_block_is_recomputed_once() -> None:
    model, handle = attached(reentrant=False)
    runs: list[str] = []
    for name, module in model.named_modules():
        if name.endswith("mlp"):
            module.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    gradients(model, handle, "another adapter")
    assert sorted(runs) == sorted(2 * ["model.layers.0.mlp", "model.layers.1.mlp"])


def test_detached_the_blocks_are_recomputed_as_before() -> None:
    model, handle = attached(reentrant=False)
    kinds = {type(module) for module in tiny("llama").modules()}
    handle.detach()
    assert {type(module) for module in model.modules()} == kinds
    model.requires_grad_(True)
    model(IDS, use_cache=False).logits.float().square().mean().backward()
    plain = tiny("llama").train().requires_grad_(True)
    plain(IDS, use_cache=False).logits.float().square().mean().backward()
    for name, parameter in plain.named_parameters():
        assert torch.allclose(model.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-7)


# -- the property ----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    gradient_checkpointing = False


def test_a_block_that_nobody_recomputes_has_no_such_function() -> None:
    block = Block()
    assert can_be_recomputed(block)
    assert not can_be_recomputed(nn.Linear(2, 2))
    bind_recomputation(block, AdapterState())
    assert not hasattr(block, "_gradient_checkpointing_func")
    with pytest.raises(AttributeError, match="'Block' object has no attribute '_gradient_checkpointing_func'"):
        _ = block._gradient_checkpointing_func


def test_the_function_that_was_set_is_the_one_that_comes_back() -> None:
    block, state = Block(), AdapterState(("a",))
    calls: list[Any] = []

    def recompute(function: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return function

    bind_recomputation(block, state)
    block._gradient_checkpointing_func = recompute
    bound: Any = block._gradient_checkpointing_func(lambda: state.active, 1, two=2)
    state.change(active=("b",))
    assert bound() == ("a",)
    assert state.active == ("b",)
    assert calls == [((1,), {"two": 2})]
    assert type(copy.deepcopy(block)) is type(block)
    unbind_recomputation(block)
    assert type(block) is Block
    assert block._gradient_checkpointing_func is recompute
    assert "lora_state" not in vars(block)


# -- somebody's own checkpointing ------------------------------------------------------------------------------------


def plain() -> tuple[nn.Module, AdapterState]:
    torch.manual_seed(0)
    state = AdapterState(("a",))
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh()).requires_grad_(False)
    for number in (0, 2):
        layer = adapt_in_place(model[number], state, str(number), frozen_weight)  # type: ignore[arg-type]
        for name in ("a", "b"):
            layer.lora[name] = low_rank_of(Adapter(2, 4.0), 6, 6, p=0.5)
    return model.train(), state


def own(run: Callable[[nn.Module, AdapterState, Tensor], Tensor], active: tuple[str, ...]) -> Gradients:
    model, state = plain()
    x = torch.linspace(-1, 1, 30).view(5, 6).requires_grad_()
    state.change(counter=TokenCounter(1, 1, torch.arange(5)))
    loss = run(model, state, x).square().sum()
    state.change(active=active, counter=None)
    loss.backward()
    assert x.grad is not None
    return {"x": x.grad} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("active", [("a",), ("b",), ("a", "b"), ()])
def test_a_bound_function_is_recomputed_with_the_adapters_of_then(active: tuple[str, ...], reentrant: bool) -> None:
    expected = own(lambda model, _, x: model(x), ("a",))
    assert set(expected) == {"x", *(f"{number}.lora.a.{factor}" for number in (0, 2) for factor in "AB")}

    def bound(model: nn.Module, state: AdapterState, x: Tensor) -> Tensor:
        return checkpoint(state.bound(model), x, use_reentrant=reentrant)

    def unbound(model: nn.Module, state: AdapterState, x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=reentrant)

    assert same(own(bound, active), expected)
    with suppress(RuntimeError):  # torch may see another graph
        assert not same(own(unbound, active), expected)
