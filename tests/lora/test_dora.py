"""DoRA (arXiv:2402.09353): its start, its norm, its dense delta. Forward and gradients are in `test_layer.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from loratune.lora import LowRank, row_norms
from tests.lora.cases import SLOW, Adapter, Case, adapted, cases, gap, low_ranks, stored_rows, update_of, updates_of
from tests.oracle import lora_reference as oracle

DORA = ("dora", "dora from a start")


def at_its_start(layer: Any, *, start: bool) -> LowRank:
    """Puts a DoRA adapter on, as it is before the first step."""
    W = stored_rows(layer)
    A, B = torch.randn(3, W.shape[1]), torch.randn(W.shape[0], 3)
    began = (A.clone(), B.clone()) if start else None
    low_rank = LowRank(A, B if start else torch.zeros_like(B), scale=1.7, magnitude=row_norms(W), start=began)
    layer.lora.clear()
    layer.lora["adapter0"] = low_rank
    return low_rank


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SLOW
@given(case=cases("dora", most=1))
def test_it_starts_as_the_base_bit_for_bit(start: bool, dtype: torch.dtype, case: Case) -> None:
    layer, state = adapted(case, dtype)
    at_its_start(layer, start=start)
    x = torch.randn(*case.lead, case.inner, dtype=dtype)
    y = layer(x)
    state.change(active=())
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("bias", [False, True])
def test_it_starts_as_the_base_under_autocast(bias: bool) -> None:
    layer, state = adapted(Case(inner=8, bias=bias, adapters=(Adapter(3, 6.0, variant="dora"),), empty_row=True))
    at_its_start(layer, start=False)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        state.change(active=())
        assert torch.equal(y, layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_norms_are_the_lengths_of_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    W = torch.randn(7, 300, dtype=dtype)
    norms = row_norms(W)
    assert norms.dtype == torch.float32
    assert gap(norms, np.linalg.norm(oracle.exact(W), axis=1)) < 1e-6
    assert row_norms(W.double()).dtype == torch.float64


@pytest.mark.parametrize("variant", DORA)
@SLOW
@given(data=st.data())
def test_the_norm_is_that_of_the_dense_sum(variant: str, data: st.DataObject) -> None:
    case = data.draw(cases(variant, most=1))
    layer, _ = adapted(case)
    (low_rank,) = low_ranks(layer.double())
    W = stored_rows(layer)
    expected = oracle.stretch(oracle.exact(W), update_of(low_rank, case.adapters[0]))
    assert expected is not None
    assert gap(low_rank.stretch(W), expected) < 1e-9


def test_the_norm_of_a_bf16_weight_is_taken_in_fp32() -> None:
    torch.manual_seed(0)
    W = torch.randn(16, 512).bfloat16()
    low_rank = LowRank(torch.randn(4, 512) / 2, torch.randn(16, 4) / 2, scale=2.0, magnitude=row_norms(W))
    update = update_of(low_rank, Adapter(4, 8.0))
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = low_rank.stretch(W)
        expected = oracle.stretch(oracle.exact(W), update)
        assert expected is not None
        assert gap(found, expected) < 1e-6


LEFT = [1.0, 1e-1, 1e-2, 1e-3, 1e-5, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("left", LEFT)
def test_where_the_update_cancels_the_weight_the_norm_is_known_and_bounded(left: float, dtype: torch.dtype) -> None:
    """Against a dense sum in fp64: off by 16 roundings of ‖W‖² + s² ‖B A‖² at most, and never less than that."""
    torch.manual_seed(0)
    A, B = torch.randn(16, 576, dtype=dtype), torch.randn(1536, 16, dtype=dtype) / 4
    scale = 2.0
    update = scale * B.double() @ A.double()
    W = (left * torch.randn(1536, 576).double() - update).to(dtype)
    low_rank = LowRank(A, B, scale=scale, magnitude=row_norms(W))
    norm = (row_norms(W) / low_rank.stretch(W)).detach().double()
    known_to = 16 * torch.finfo(dtype).eps * (W.double().square().sum(1) + update.square().sum(1))
    expected = (W.double() + update).square().sum(1)
    assert bool(((norm.square() - expected).abs() <= 1.01 * known_to).all())
    assert bool((norm.square() >= 0.99 * known_to).all())
    if left >= 0.1:
        assert gap(norm, expected.sqrt().numpy()) < 1e-4


class Products(TorchFunctionMode):
    """The shapes of what matrix products return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (Tensor.__matmul__, Tensor.matmul, Tensor.mm, torch.matmul, torch.mm, torch.nn.functional.linear):
            self.shapes.add(tuple(result.shape))
        return result


def test_no_dense_product_of_the_factors_is_formed() -> None:
    layer, _ = adapted(Case(inner=40, outer=30, adapters=(Adapter(3, 6.0, variant="dora"),)))
    with Products() as products:
        layer(torch.randn(2, 40)).sum().backward()
    assert (3, 3) in products.shapes, "A Aᵀ"
    assert not {(30, 40), (40, 30)} & products.shapes


def test_rows_of_zeros_stay_zero_and_train() -> None:
    layer, _ = adapted(Case(inner=4, outer=3, bias=False, adapters=(Adapter(2, 4.0, variant="dora"),), empty_row=True))
    low_rank = at_its_start(layer, start=False)
    x = torch.randn(5, 4)
    y = layer(x)
    assert not y[:, 0].any()
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in low_rank.parameters())
    with torch.no_grad():
        low_rank.B.add_(1.0)
    assert not layer(x)[:, 0].any(), "its length is the magnitude, which is still zero"
    assert low_rank.delta(stored_rows(layer)).isfinite().all()


@pytest.mark.parametrize("variant", DORA)
@SLOW
@given(data=st.data())
def test_merged_into_the_weight_it_computes_the_same(variant: str, data: st.DataObject) -> None:
    case = data.draw(cases(variant, "plain", "start"))
    layer, state = adapted(case)
    W = stored_rows(layer.double())
    for low_rank, update in zip(low_ranks(layer), updates_of(case, layer), strict=True):
        delta = low_rank.delta(W)
        assert not delta.requires_grad
        assert np.allclose(oracle.exact(delta), oracle.delta(oracle.exact(W), update), rtol=1e-9, atol=1e-9)
    x = torch.randn(*case.lead, case.inner).double()
    y = layer(x)
    with torch.no_grad():
        W += torch.stack([low_rank.delta(W) for low_rank in low_ranks(layer)]).sum(0)
    state.change(active=())
    assert torch.allclose(layer(x), y, rtol=1e-9, atol=1e-9)


def test_its_delta_is_formed_in_the_dtype_asked_for() -> None:
    layer, _ = adapted(Case(inner=64, outer=48, adapters=(Adapter(4, 8.0, variant="dora"),)))
    (low_rank,) = low_ranks(layer)
    W = stored_rows(layer)
    exact = oracle.delta(oracle.exact(W), update_of(low_rank, Adapter(4, 8.0)))
    for dtype, near in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        delta = low_rank.delta(W.to(dtype))
        assert delta.dtype == dtype
        assert gap(delta, exact) < near
