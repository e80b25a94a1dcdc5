"""Updates that count from where A and B started (PiSSA, OLoRA; SEMANTICS 6), and biases behind B."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

from loratune.lora import AdapterState, LowRank, adapt_in_place, decomposed_factors, generator_for
from loratune.quant import frozen_weight
from tests.lora.cases import SLOW, Adapter, Case, adapted, base_of, cases, gap, low_ranks, update_of
from tests.oracle import lora_reference as oracle


def moved(A: Tensor, B: Tensor, *, by: float, scale: float = 1.0) -> LowRank:
    """An adapter that has gone from A and B by a share of their size."""
    step = [by * factor.abs().mean() * torch.randn_like(factor) for factor in (A, B)]
    return LowRank(A + step[0], B + step[1], scale=scale, start=(A, B))


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int16 if values.dtype == torch.bfloat16 else torch.int32)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SLOW
@given(case=cases("start", most=2))
def test_at_the_start_nothing_is_added_bit_for_bit(dtype: torch.dtype, autocast: bool, case: Case) -> None:
    layer, state = adapted(case, dtype)
    for name, low_rank in list(layer.lora.items()):
        start = low_rank.A.detach().clone(), low_rank.B.detach().clone()
        layer.lora[name] = LowRank(low_rank.A.detach(), low_rank.B.detach(), scale=low_rank.scale, start=start)
    x = torch.randn(*case.lead, case.inner, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = layer(x)
        state.change(active=())
        assert torch.equal(bits(y), bits(layer(x)))
    for low_rank in low_ranks(layer):
        assert not low_rank.delta(torch.ones(case.outer, case.inner)).any()


@SLOW
@given(case=cases("start", most=1))
def test_its_factors_are_a_plain_adapter_of_twice_the_rank(case: Case) -> None:
    layer, _ = adapted(case)
    (low_rank,) = low_ranks(layer.double())
    A, B = low_rank.factors()
    assert A.shape == (2 * low_rank.r, case.inner)
    assert B.shape == (case.outer, 2 * low_rank.r)
    plain = LowRank(A.detach(), B.detach(), scale=low_rank.scale)
    x = torch.randn(*case.lead, case.inner).double()
    assert torch.allclose(plain(x), low_rank(x), rtol=1e-12, atol=1e-12)
    expected = oracle.dense(update_of(low_rank, case.adapters[0]))
    for one in (plain, low_rank):
        delta = one.delta(torch.zeros(case.outer, case.inner, dtype=torch.float64))
        assert gap(delta, expected) < 1e-9


def test_a_plain_adapters_factors_are_its_own() -> None:
    low_rank = LowRank(torch.randn(2, 3), torch.randn(4, 2), scale=1.0)
    A, B = low_rank.factors()
    assert A is low_rank.A
    assert B is low_rank.B


def test_the_start_is_kept_with_the_adapter_and_never_trains() -> None:
    torch.manual_seed(0)
    low_rank = moved(torch.randn(2, 3), torch.randn(4, 2), by=0.1)
    assert {name for name, _ in low_rank.named_parameters()} == {"A", "B"}
    assert set(low_rank.state_dict()) == {"A", "B", "A0", "B0"}
    low_rank(torch.randn(5, 3)).sum().backward()
    assert all(parameter.grad is not None for parameter in low_rank.parameters())
    assert low_rank.A0 is not None
    assert low_rank.A0.grad is None


@pytest.mark.parametrize("by", [1e-3, 1e-2, 1e-1])
def test_in_bf16_it_loses_less_than_the_difference_of_two_products(by: float) -> None:
    """Relative errors at steps of 1e-3, 1e-2 and 1e-1: 0.003 each, against 2.9, 0.38 and 0.040 of the difference."""
    torch.manual_seed(0)
    W = torch.randn(96, 128) / 11
    A, B = decomposed_factors("pissa", W, r=8, scale=2.0, generator=generator_for(0))
    low_rank = moved(A, B, by=by, scale=2.0)
    x = torch.randn(32, 128).bfloat16()
    update = update_of(low_rank, Adapter(8, 16.0))
    expected = oracle.forward(oracle.exact(W) * 0, None, oracle.exact(x), [update])

    def product(A: Tensor, B: Tensor) -> Tensor:
        return 2.0 * F.linear(F.linear(x, A.bfloat16()), B.bfloat16())

    ours, theirs = gap(low_rank(x), expected), gap(product(low_rank.A, low_rank.B) - product(A, B), expected)
    assert ours < 2**-7, f"{ours:.4f}"
    assert theirs > 3 * ours, f"{theirs:.4f} against {ours:.4f}"


def test_with_masters_in_fp32_a_delta_in_fp64_is_as_good_as_them() -> None:
    torch.manual_seed(0)
    low_rank = moved(torch.randn(4, 30), torch.randn(20, 4), by=0.5)
    expected = oracle.dense(update_of(low_rank, Adapter(4, 4.0)))
    delta = low_rank.delta(torch.zeros(20, 30, dtype=torch.float64))
    assert delta.dtype == torch.float64
    assert gap(delta, expected) < 1e-6


# -- a bias behind B -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_behind_b_is_scaled_with_it(dtype: torch.dtype) -> None:
    low_rank = LowRank(torch.zeros(2, 3), torch.zeros(4, 2), scale=0.5, bias=torch.tensor([1.0, -2.0, 3.0, 0.0]))
    y = low_rank(torch.randn(7, 3, dtype=dtype))
    assert y.dtype == dtype
    assert torch.equal(y, torch.tensor([0.5, -1.0, 1.5, 0.0], dtype=dtype).expand(7, 4))


def test_it_is_no_part_of_the_delta_of_the_weight() -> None:
    torch.manual_seed(0)
    A, B, W = torch.randn(2, 3), torch.randn(4, 2), torch.randn(4, 3)
    with_bias = LowRank(A, B, scale=0.5, bias=torch.ones(4))
    assert torch.equal(with_bias.delta(W), LowRank(A, B, scale=0.5).delta(W))


def test_a_layer_without_a_bias_can_have_one_behind_b() -> None:
    base = base_of(Case(bias=False))
    state = AdapterState(active=("a",))
    layer = adapt_in_place(base, state, "x", frozen_weight)
    layer.lora["a"] = LowRank(torch.zeros(2, 5), torch.zeros(4, 2), scale=2.0, bias=torch.arange(4.0))
    y = layer(torch.zeros(3, 5))
    assert torch.equal(y, (2 * torch.arange(4.0)).expand(3, 4))
