"""Tensors that an adapter has its own of: what reads the module sees them, and the base's stay."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loratune.lora import AdapterState, LowRank, adapt_in_place, give_back, release, replace_in
from loratune.quant import frozen_weight
from tests.lora.cases import SLOW

Make = Callable[[], nn.Module]
MODULES: dict[str, tuple[Make, Callable[[torch.dtype], Tensor]]] = {
    "Linear": (lambda: nn.Linear(5, 4), lambda dtype: torch.randn(2, 3, 5, dtype=dtype)),
    "Linear without bias": (lambda: nn.Linear(5, 4, bias=False), lambda dtype: torch.randn(3, 5, dtype=dtype)),
    "Conv1D": (lambda: Conv1D(4, 5), lambda dtype: torch.randn(2, 5, dtype=dtype)),
    "Embedding": (lambda: nn.Embedding(7, 4, padding_idx=0), lambda _: torch.tensor([[1, 6, 0]])),
    "LayerNorm": (lambda: nn.LayerNorm(5), lambda dtype: torch.randn(2, 5, dtype=dtype)),
}
DTYPES = [torch.float32, torch.bfloat16]


def made(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, inputs = MODULES[kind]
    return make().to(dtype).requires_grad_(False), inputs(dtype)


def masters(module: nn.Module, *, seed: int = 1) -> dict[str, Tensor]:
    """Others in fp32 for all its parameters."""
    torch.manual_seed(seed)
    return {name: torch.randn(tensor.shape) for name, tensor in module._parameters.items() if tensor is not None}


def with_these(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """A module of the same class, untouched, that has these tensors as its own."""
    other = copy.deepcopy(module)
    for name, tensor in tensors.items():
        cast(Tensor, other._parameters[name]).data = tensor.to(cast(Tensor, other._parameters[name]).dtype)
    return other.requires_grad_(True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MODULES)
def test_the_module_computes_with_the_active_adapters_tensors(kind: str, dtype: torch.dtype) -> None:
    module, x = made(kind, dtype)
    tensors, state = masters(module), AdapterState()
    expected, base = with_these(module, tensors)(x), module(x)
    replace_in(module, state, "a", {name: tensor.clone() for name, tensor in tensors.items()})
    assert torch.equal(module(x), base)
    state.change(active=("a",))
    for training in (True, False):
        y = module.train(training)(x)
        assert torch.equal(y, expected)
        assert y.dtype == dtype
    assert not torch.equal(expected, base)
    state.change(active=("somebody else",))
    assert torch.equal(module(x), base)


@pytest.mark.parametrize("kind", MODULES)
def test_attributes_give_a_view_of_the_active_adapters_or_the_bases_very_parameter(kind: str) -> None:
    module, _ = made(kind)
    own = dict(module._parameters)
    state = AdapterState()
    added = replace_in(module, state, "a", masters(module))
    for name, parameter in own.items():
        assert getattr(module, name) is parameter
    state.change(active=("a",))
    for name, parameter in own.items():
        assert module._parameters[name] is parameter
        if parameter is not None:
            seen, master = getattr(module, name), added.get_parameter(name)
            assert seen.data_ptr() == master.data_ptr()
            assert torch.equal(seen, master)
            assert not isinstance(seen, nn.Parameter), "who ties it elsewhere is told so"


def test_a_finer_master_is_seen_in_the_bases_dtype() -> None:
    module, _ = made("Linear", torch.bfloat16)
    added = replace_in(module, AdapterState(("a",)), "a", masters(module))
    assert cast(Tensor, module.weight).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in added.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MODULES)
def test_gradients_reach_the_replacement_and_not_the_base(kind: str, dtype: torch.dtype) -> None:
    module, x = made(kind, dtype)
    own = {name: tensor.clone() for name, tensor in module.named_parameters()}
    tensors = masters(module)
    twin = with_these(module, tensors)
    added = replace_in(module, AdapterState(("a",)), "a", tensors)
    module.requires_grad_(True)  # as somebody's loop may do: the base is not part of the graph
    module(x).square().sum().backward()
    twin(x).square().sum().backward()
    for name, parameter in added.named_parameters():
        theirs = twin.get_parameter(name).grad
        assert parameter.grad is not None
        assert theirs is not None
        assert parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad, theirs.float())
        assert parameter.grad.any()
    for name, tensor in own.items():
        base = cast(nn.Parameter, module._parameters[name])
        assert base.grad is None
        assert torch.equal(base, tensor)


def test_some_of_the_tensors_leave_the_others_to_the_base() -> None:
    module, x = made("Linear")
    bias = torch.randn(4)
    own = module.weight
    replace_in(module, AdapterState(("a",)), "a", {"bias": bias})
    assert module.weight is own
    assert torch.equal(module(x), nn.functional.linear(x, cast(Tensor, own), bias))


def test_each_adapter_has_its_own_and_the_first_active_one_counts() -> None:
    module, x = made("Linear")
    state = AdapterState()
    tensors = {"a": masters(module, seed=1), "b": {"bias": torch.randn(4)}, "c": {"weight": torch.randn(4, 5)}}
    expected = {name: with_these(module, one)(x) for name, one in tensors.items()}
    both = with_these(module, tensors["b"] | tensors["c"])(x)
    for name, one in tensors.items():
        replace_in(module, state, name, one)
    for name, y in expected.items():
        state.change(active=(name,))
        assert torch.equal(module(x), y)
    state.change(active=("b", "c"))
    assert torch.equal(module(x), both)
    state.change(active=("a", "b"))
    assert torch.equal(module(x), expected["a"])


def test_a_tensor_that_no_adapter_has_any_more_is_the_modules_own_again() -> None:
    module, _ = made("Linear")
    other, _ = made("Linear")
    state = AdapterState()
    replace_in(module, state, "a", masters(module))
    for one in (module, other):
        replace_in(one, state, "b", {"bias": torch.randn(4)})
    give_back(module, "a")
    assert type(module) is type(other)
    assert not isinstance(vars(type(module)).get("weight"), property)


@SLOW
@given(
    kind=st.sampled_from(["Linear", "Conv1D", "LayerNorm"]),
    order=st.permutations(["a", "b", "c", "low rank"]),
    active=st.lists(st.sampled_from(["a", "b", "c"]), unique=True).map(tuple),
)
def test_taken_off_in_any_order_nothing_is_left(kind: str, order: list[str], active: tuple[str, ...]) -> None:
    module, x = made(kind)
    before, cls, y = dict(vars(module)), type(module), module(x)
    parameters, children = dict(module._parameters), dict(module._modules)
    state = AdapterState(active)
    names = {"a": ("weight", "bias"), "b": ("bias",), "c": ("weight",)}
    for adapter, some in names.items():
        replace_in(module, state, adapter, {n: t for n, t in masters(module).items() if n in some})
    layer = adapt_in_place(module, state, "x", cast(Any, frozen_weight)) if kind != "LayerNorm" else None
    for name in order:
        if name != "low rank":
            give_back(module, name)
            names.pop(name)
        elif layer is not None:
            release(layer)
        seen = {tensor for adapter in active for tensor in names.get(adapter, ())}
        for tensor, own in parameters.items():
            assert (getattr(module, tensor) is own) == (tensor not in seen)
    assert type(module) is cls
    assert vars(module) == before
    assert module._parameters == parameters
    assert module._modules == children
    assert torch.equal(module(x), y)


# -- checkpoints and copies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", [(), ("a",)])
def test_state_dict_keeps_the_bases_keys_and_tensors(active: tuple[str, ...]) -> None:
    module, _ = made("Linear")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    replace_in(module, AdapterState(active), "a", masters(module))
    after = module.state_dict()
    assert set(after) == {*before, "lora_replaced.a.weight", "lora_replaced.a.bias"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("active", [(), ("a",)])
def test_a_checkpoint_of_the_base_alone_loads_into_the_base(active: tuple[str, ...]) -> None:
    module, _ = made("Linear")
    other = {"weight": torch.ones(4, 5), "bias": torch.ones(4)}
    tensors = masters(module)
    added = replace_in(module, AdapterState(active), "a", {name: tensor.clone() for name, tensor in tensors.items()})
    module.load_state_dict(other)
    assert all(torch.equal(cast(Tensor, module._parameters[name]), tensor) for name, tensor in other.items())
    assert all(torch.equal(added.get_parameter(name), tensor) for name, tensor in tensors.items())


def test_a_damaged_checkpoint_is_reported() -> None:
    module, _ = made("Linear")
    replace_in(module, AdapterState(), "a", masters(module))
    state = dict(module.state_dict())
    del state["lora_replaced.a.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_replaced\.a\.bias"):
        module.load_state_dict(state)


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return cast(nn.Module, torch.load(file, weights_only=False))


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: cast(nn.Module, pickle.loads(pickle.dumps(module))),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", MODULES)
def test_a_copy_is_the_same_and_independent(how: str, kind: str) -> None:
    module, x = made(kind)
    state = AdapterState(("a",))
    replace_in(module, state, "a", masters(module, seed=1))
    replace_in(module, state, "b", {"weight": masters(module, seed=2)["weight"]})
    if kind not in {"Embedding", "LayerNorm"}:
        layer = adapt_in_place(module, state, "x", cast(Any, frozen_weight))
        layer.lora["a"] = LowRank(torch.randn(2, 5), torch.randn(4, 2), scale=1.0)
    y = module(x)
    twin = COPIES[how](module)
    assert type(twin) is type(module)
    assert torch.equal(twin(x), y)
    theirs = cast(AdapterState, twin.lora_state)
    theirs.change(active=("b",))
    assert torch.equal(module(x), y), "its state is its own"
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.fill_(0.5)
    assert torch.equal(module(x), y), "so are its tensors"
    for name in ("a", "b"):
        give_back(twin, name)
    assert not hasattr(twin, "lora_replaced")
    assert hasattr(module, "lora_replaced")
