"""The adapted layer against the slow reference: forward, gradients, dtypes, several adapters, every variant."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from loratune.lora import AdapterState, LoraLayer, LowRank, Rows, TokenCounter, adapt_in_place, bank_of, release
from loratune.quant import frozen_weight
from tests.lora.cases import (
    KINDS,
    PATH,
    SLOW,
    VARIANTS,
    Adapter,
    Case,
    adapted,
    adapters_of,
    cases,
    gap,
    low_ranks,
    stored_rows,
    updates_of,
    weight_of,
)
from tests.oracle import lora_reference as oracle

PARTS = ("A", "B", "bias", "magnitude")


def check_against_reference(
    case: Case, layer: LoraLayer, x: Tensor, mask: oracle.Array | None = None, *, near: float = 1e-9
) -> None:
    W, b = weight_of(layer)
    rows = oracle.exact(x).reshape(-1, case.inner)
    updates = updates_of(case, layer, mask)
    x = x.clone().requires_grad_()
    y = layer(x)
    assert y.shape == (*x.shape[:-1], case.outer)
    assert y.dtype == x.dtype
    assert gap(y, oracle.forward(W, b, rows, updates)) < near

    g = torch.randn_like(y)
    y.backward(g)
    to_x, found = oracle.gradients(W, rows, oracle.exact(g).reshape(-1, case.outer), updates)
    assert x.grad is not None
    assert gap(x.grad, to_x) < near
    for low_rank, of in zip(low_ranks(layer), found, strict=True):
        for name, expected in zip(PARTS, (of.A, of.B, of.c, of.magnitude), strict=True):
            ours = getattr(low_rank, name)
            assert (ours is None) == (expected is None), name
            assert ours is None or gap(ours.grad, expected) < near, name
    assert layer.weight.grad is None


@pytest.mark.parametrize("variant", VARIANTS)
@SLOW
@given(data=st.data())
def test_forward_and_gradients_of_one_adapter(variant: str, data: st.DataObject) -> None:
    case = data.draw(cases(variant, most=1))
    layer, _ = adapted(case)
    check_against_reference(case, layer.double(), torch.randn(*case.lead, case.inner).double())


@SLOW
@given(case=cases())
def test_forward_and_gradients_of_several_adapters(case: Case) -> None:
    layer, _ = adapted(case)
    check_against_reference(case, layer.double(), torch.randn(*case.lead, case.inner).double())


@settings(SLOW, max_examples=15)
@given(case=cases(width=(12, 32)))
def test_forward_and_gradients_in_fp32(case: Case) -> None:
    layer, _ = adapted(case)
    check_against_reference(case, layer, torch.randn(*case.lead, case.inner), near=1e-5)


@SLOW
@given(case=cases(), p=st.floats(0.05, 0.9), step=st.integers(0, 2**40), seed=st.integers(0, 2**63 - 1))
def test_forward_and_gradients_with_dropout(case: Case, p: float, step: int, seed: int) -> None:
    layer, state = adapted(case, p=p)
    tokens = torch.randint(0, 10_000, case.lead)
    state.change(counter=TokenCounter(seed, step, tokens))
    mask = oracle.dropout_factors(
        tokens.flatten().tolist(), case.inner, p, seed=seed, step=step, layer=layer.lora_index
    )
    x = torch.randn(*case.lead, case.inner).double()
    check_against_reference(case, layer.double().train(), x, mask)


@SLOW
@given(case=cases(), dora=adapters_of("dora"))
def test_beside_a_dora_adapter_the_others_add_what_they_add_alone(case: Case, dora: Adapter) -> None:
    layer, state = adapted(replace(case, adapters=(dora, *case.adapters)))
    layer.double()
    x = torch.randn(*case.lead, case.inner).double()
    together = layer(x)
    state.change(active=())
    base = layer(x)
    alone = []
    for name in layer.lora:
        state.change(active=(name,))
        alone.append(layer(x) - base)
    assert torch.allclose(together, base + torch.stack(alone).sum(0), rtol=1e-9, atol=1e-9)


@SLOW
@given(case=cases())
def test_only_the_active_ones_count(case: Case) -> None:
    layer, state = adapted(case)
    layer.double()
    x = torch.randn(*case.lead, case.inner).double()
    W, b = weight_of(layer)
    rows = oracle.exact(x).reshape(-1, case.inner)
    updates = updates_of(case, layer)
    for number, name in enumerate(layer.lora):
        state.change(active=(name,))
        assert gap(layer(x), oracle.forward(W, b, rows, updates[number : number + 1])) < 1e-9
    state.change(active=("absent here",))
    nothing = layer(x)
    state.change(active=())
    assert torch.equal(nothing, layer(x))
    release(layer)
    assert torch.equal(nothing, layer(x))


# -- dtypes ----------------------------------------------------------------------------------------------------------


def plain_formula(layer: LoraLayer, x: Tensor) -> Tensor:
    """As one would write it in torch, in the dtype of x or of autocast."""
    W, bias = stored_rows(layer), layer._parameters["bias"]
    Wx = F.linear(x, W)
    y = F.linear(x, W, bias)
    for low_rank in low_ranks(layer):
        u = low_rank.scale * F.linear(F.linear(x, low_rank.A.to(x.dtype)), low_rank.B.to(x.dtype))
        dense = low_rank.scale * (low_rank.B @ low_rank.A).float()
        if low_rank.A0 is not None and low_rank.B0 is not None:
            u = u - low_rank.scale * F.linear(F.linear(x, low_rank.A0.to(x.dtype)), low_rank.B0.to(x.dtype))
            dense = dense - low_rank.scale * (low_rank.B0 @ low_rank.A0).float()
        if low_rank.bias is not None:
            u = u + (low_rank.scale * low_rank.bias).to(u.dtype)
        if low_rank.magnitude is not None:
            g = (low_rank.magnitude / (W.float() + dense).norm(dim=1)).to(u.dtype)
            u = g * (Wx + u) - Wx
        y = y + u
    return y


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
@SLOW
@given(case=cases())
def test_bf16_and_autocast_are_as_good_as_the_plain_formula(base: torch.dtype, case: Case) -> None:
    layer, _ = adapted(case, base)
    x = torch.randn(*case.lead, case.inner, dtype=base)
    W, b = weight_of(layer)
    reference = oracle.forward(W, b, oracle.exact(x).reshape(-1, case.inner), updates_of(case, layer))
    assert {parameter.dtype for parameter in layer.lora.parameters()} == {torch.float32}, "masters are fp32"
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=base == torch.float32):
        y, plain = layer(x), plain_formula(layer, x)
    # A handful of numbers can be lucky: then the format's own precision is the yardstick.
    assert gap(y, reference) <= 2 * max(gap(plain, reference), 2**-8)


DTYPES = [
    (torch.bfloat16, False),
    (torch.bfloat16, True),
    (torch.float32, False),
    (torch.float32, True),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("base", "autocast"), DTYPES)
def test_dtypes_with_and_without_autocast(kind: str, variant: str, base: torch.dtype, autocast: bool) -> None:
    layer, _ = adapted(Case(kind, 8, 6, True, (2, 3), (Adapter(4, 8.0, variant=variant),)), base)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = layer(torch.randn(2, 3, 8, dtype=base))
    y.float().sum().backward()
    for parameter in layer.lora.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.norm() > 0
    assert y.dtype == (torch.bfloat16 if autocast else base)


class Narrow(nn.Linear):
    """As layers with a compute dtype of their own do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).bfloat16()


def test_the_base_decides_the_dtype_of_the_output() -> None:
    state = AdapterState(active=("a",))
    layer = adapt_in_place(Narrow(4, 3), state, PATH, frozen_weight)
    low_rank = layer.lora["a"] = LowRank(torch.randn(2, 4), torch.randn(3, 2), scale=1.0)
    assert layer(torch.randn(5, 4)).dtype == torch.bfloat16
    bank = bank_of([None, low_rank], torch.float32)
    assert bank is not None
    state.change(rows=Rows(torch.tensor([0, 1]), {layer: bank}))
    assert layer(torch.randn(2, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_assigns_nothing(variant: str) -> None:
    layer, state = adapted(Case(inner=4, lead=(2,), adapters=(Adapter(2, 4.0, variant=variant),)), p=0.5)
    state.change(counter=TokenCounter(0, 0, torch.arange(2)))
    before = dict(vars(layer)), {name: dict(vars(low_rank)) for name, low_rank in layer.lora.items()}, state.view
    tensors = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.train()(torch.randn(2, 4)).sum().backward()
    vars(layer)["training"] = before[0]["training"]
    assert (vars(layer), {name: vars(one) for name, one in layer.lora.items()}, state.view) == before
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in layer.state_dict().items())
