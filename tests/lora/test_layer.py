"""The adapted layer against the slow reference: forward, gradients, dtypes, several adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loratune.lora import AdapterState, LoraLayer, LowRank, TokenCounter, adapt_in_place, release, scale_of
from tests.oracle import lora_reference as oracle

SLOW = settings(derandomize=True, deadline=None, max_examples=40, database=None)
PATH = "model.layers.3.q_proj"


@dataclass(frozen=True)
class Case:
    kind: str
    inner: int
    outer: int
    bias: bool
    lead: tuple[int, ...]
    adapters: tuple[tuple[int, float, bool], ...]  # r, alpha, rsLoRA
    seed: int


CASES = st.builds(
    Case,
    kind=st.sampled_from(["Linear", "Conv1D"]),
    inner=st.integers(1, 9),
    outer=st.integers(1, 9),
    bias=st.booleans(),
    lead=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    adapters=st.lists(st.tuples(st.integers(1, 12), st.floats(0.1, 64), st.booleans()), min_size=1, max_size=3).map(
        tuple
    ),
    seed=st.integers(0, 2**32),
)


def base_of(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(case.seed)
    if case.kind == "Linear":
        module: nn.Module = nn.Linear(case.inner, case.outer, bias=case.bias)
    else:
        module = Conv1D(case.outer, case.inner)  # has always a bias
        nn.init.normal_(module.weight)
    nn.init.normal_(module.bias) if module.bias is not None else None
    return module.to(dtype).requires_grad_(False)


def weight_of(module: nn.Module) -> tuple[oracle.Array, oracle.Array | None]:
    W = oracle.exact(module.weight)
    return (W.T if isinstance(module, Conv1D) else W), None if module.bias is None else oracle.exact(module.bias)


def adapted(case: Case, dtype: torch.dtype = torch.float32, *, p: float = 0.0) -> tuple[LoraLayer, AdapterState]:
    module = base_of(case, dtype)
    state = AdapterState()
    layer = adapt_in_place(module, state, PATH)
    for number, (r, alpha, rslora) in enumerate(case.adapters):
        A, B = torch.randn(r, case.inner), torch.randn(case.outer, r)
        layer.lora[f"adapter{number}"] = LowRank(A, B, scale=scale_of(r, alpha, rslora), dropout=p)
    state.active = tuple(layer.lora)
    return layer, state


def updates_of(case: Case, layer: LoraLayer, mask: oracle.Array | None = None) -> list[oracle.Update]:
    return [
        oracle.Update(oracle.exact(low_rank.A), oracle.exact(low_rank.B), oracle.scale(r, alpha, rslora=rslora), mask)
        for low_rank, (r, alpha, rslora) in zip(layer.lora.values(), case.adapters, strict=True)
    ]


def gap(ours: Any, reference: oracle.Array) -> float:
    """Relative distance by norm."""
    ours = oracle.exact(ours) if isinstance(ours, Tensor) else ours
    return float(np.linalg.norm(ours.ravel() - reference.ravel()) / max(np.linalg.norm(reference), 1e-30))


def check_against_reference(case: Case, layer: LoraLayer, x: Tensor, mask: oracle.Array | None = None) -> None:
    W, b = weight_of(layer)
    rows = oracle.exact(x).reshape(-1, case.inner)
    updates = updates_of(case, layer, mask)
    x = x.clone().requires_grad_()
    y = layer(x)
    assert y.shape == (*x.shape[:-1], case.outer)
    assert gap(y, oracle.forward(W, b, rows, updates)) < 1e-5

    g = torch.randn_like(y)
    y.backward(g)
    to_x, factors = oracle.gradients(W, rows, oracle.exact(g).reshape(-1, case.outer), updates)
    assert x.grad is not None
    assert gap(x.grad, to_x) < 1e-5
    for low_rank, (to_A, to_B) in zip(layer.lora.values(), factors, strict=True):
        assert low_rank.A.grad is not None
        assert low_rank.B.grad is not None
        # Where cancellation leaves little, an error is one of the terms that cancelled.
        assert gap(low_rank.A.grad, to_A) < 1e-5
        assert gap(low_rank.B.grad, to_B) < 1e-5
    assert layer.weight.grad is None


@SLOW
@given(case=CASES)
def test_forward_and_gradients(case: Case) -> None:
    layer, _ = adapted(case)
    check_against_reference(case, layer, torch.randn(*case.lead, case.inner))


@SLOW
@given(case=CASES, p=st.floats(0.05, 0.9), step=st.integers(0, 2**40), seed=st.integers(0, 2**63 - 1))
def test_forward_and_gradients_with_dropout(case: Case, p: float, step: int, seed: int) -> None:
    layer, state = adapted(case, p=p)
    tokens = torch.randint(0, 10_000, case.lead)
    state.counter = TokenCounter(seed, step, tokens)
    mask = oracle.dropout_factors(
        tokens.flatten().tolist(), case.inner, p, seed=seed, step=step, layer=layer.lora_index
    )
    check_against_reference(case, layer.train(), torch.randn(*case.lead, case.inner), mask)


@SLOW
@given(case=CASES)
def test_only_the_active_ones_count(case: Case) -> None:
    layer, state = adapted(case)
    x = torch.randn(*case.lead, case.inner)
    W, b = weight_of(layer)
    rows = oracle.exact(x).reshape(-1, case.inner)
    updates = updates_of(case, layer)
    for number, name in enumerate(layer.lora):
        state.active = (name,)
        assert gap(layer(x), oracle.forward(W, b, rows, updates[number : number + 1])) < 1e-5
    state.active = ("absent here",)
    nothing = layer(x)
    state.active = ()
    assert torch.equal(nothing, layer(x))
    release(layer)
    assert torch.equal(nothing, layer(x))


@SLOW
@given(case=CASES)
def test_bf16_is_as_good_as_the_plain_formula(case: Case) -> None:
    layer, _ = adapted(case, torch.bfloat16)
    x = torch.randn(*case.lead, case.inner, dtype=torch.bfloat16)
    W, b = weight_of(layer)
    reference = oracle.forward(W, b, oracle.exact(x).reshape(-1, case.inner), updates_of(case, layer))
    matrix = layer.weight.T if case.kind == "Conv1D" else layer.weight
    plain = F.linear(x, matrix, layer.bias)
    for low_rank in layer.lora.values():
        assert low_rank.A.dtype == torch.float32, "masters are fp32"
        plain = plain + low_rank.scale * F.linear(F.linear(x, low_rank.A.bfloat16()), low_rank.B.bfloat16())
    y = layer(x)
    assert y.dtype == torch.bfloat16
    # A handful of numbers can be lucky: then the format's own precision is the yardstick.
    assert gap(y, reference) <= 2 * max(gap(plain, reference), 2**-8)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
def test_dtypes_with_and_without_autocast(kind: str, autocast: bool, base: torch.dtype) -> None:
    case = Case(kind, 8, 6, True, (2, 3), ((4, 8.0, False),), 0)
    layer, _ = adapted(case, base)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = layer(torch.randn(2, 3, 8, dtype=base))
    assert y.dtype == (torch.bfloat16 if autocast else base)
    y.float().sum().backward()
    (low_rank,) = layer.lora.values()
    assert low_rank.A.grad.dtype == low_rank.B.grad.dtype == torch.float32
    assert low_rank.A.grad.norm() > 0


class Narrow(nn.Linear):
    """As layers with a compute dtype of their own do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).bfloat16()


def test_the_base_decides_the_dtype_of_the_output() -> None:
    state = AdapterState(active=("a",))
    layer = adapt_in_place(Narrow(4, 3), state, PATH)
    layer.lora["a"] = LowRank(torch.randn(2, 4), torch.randn(3, 2), scale=1.0)
    assert layer(torch.randn(5, 4)).dtype == torch.bfloat16


def test_forward_assigns_nothing() -> None:
    layer, state = adapted(Case("Linear", 4, 4, True, (2,), ((2, 4.0, False),), 0), p=0.5)
    state.counter = TokenCounter(0, 0, torch.arange(2))
    before = dict(vars(layer)), {name: dict(vars(low_rank)) for name, low_rank in layer.lora.items()}, state.active
    layer.train()(torch.randn(2, 4)).sum().backward()
    vars(layer)["training"] = before[0]["training"]
    assert (vars(layer), {name: vars(one) for name, one in layer.lora.items()}, state.active) == before
