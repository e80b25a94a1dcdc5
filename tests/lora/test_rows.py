"""An adapter for each row of a batch: as if each row ran alone with its adapter (BEHAVIOUR 21)."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, NamedTuple, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from loratune.errors import AdapterStateError
from loratune.lora import AdapterState, LoraLayer, LowRank, Rows, Stack, bank_of
from tests.lora.cases import (
    SLOW,
    Adapter,
    Case,
    adapted,
    adapters_of,
    gap,
    low_rank_of,
    low_ranks,
    update_of,
    weight_of,
)
from tests.oracle import lora_reference as oracle

MIXABLE = ("plain", "bias", "start")


class Batch(NamedTuple):
    """Rows of a batch; each has the number of its adapter, 0 for the base."""

    case: Case
    index: list[int]
    middle: tuple[int, ...]


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    adapters = tuple(draw(st.lists(adapters_of(*MIXABLE), min_size=1, max_size=4)))
    case = Case(
        kind=draw(st.sampled_from(["Linear", "Conv1D"])),
        inner=draw(st.integers(1, 7)),
        outer=draw(st.integers(1, 7)),
        bias=draw(st.booleans()),
        adapters=adapters,
        seed=draw(st.integers(0, 999)),
    )
    index = draw(st.lists(st.integers(0, len(adapters)), min_size=1, max_size=6))
    return Batch(case, index, tuple(draw(st.lists(st.integers(1, 3), max_size=2))))


def mixed(
    case: Case, index: list[int], dtype: torch.dtype = torch.float32, *, tokens: int | None = None
) -> tuple[LoraLayer, AdapterState, Rows]:
    layer, state = adapted(case, dtype)
    layer.eval()
    bank = bank_of([None, *low_ranks(layer)], dtype)
    assert bank is not None
    rows = Rows(torch.tensor(index), {layer: bank}, tokens=tokens)
    state.change(active=(), rows=rows)
    return layer, state, rows


def alone(layer: LoraLayer, state: AdapterState, x: Tensor, index: list[int]) -> Tensor:
    """Each row by itself, with its adapter active."""
    out = []
    for row, number in zip(x, index, strict=True):
        with state.suspending(active=(f"adapter{number - 1}",) if number else (), rows=None):
            out.append(layer(row[None]))
    return torch.cat(out)


@SLOW
@given(batch=batches())
def test_each_row_has_its_own_adapter(batch: Batch) -> None:
    case, index, middle = batch
    layer, state, _ = mixed(case, index)
    x = torch.randn(len(index), *middle, case.inner)
    y = layer(x)
    assert y.shape == (*x.shape[:-1], case.outer)
    assert torch.allclose(y, alone(layer, state, x, index), rtol=1e-4, atol=1e-4)


@SLOW
@given(batch=batches())
def test_each_row_equals_the_reference(batch: Batch) -> None:
    case, index, middle = batch
    layer, state = adapted(case)
    bank = bank_of([None, *low_ranks(layer.double())], torch.float64)
    assert bank is not None
    state.change(active=(), rows=Rows(torch.tensor(index), {layer: bank}))
    x = torch.randn(len(index), *middle, case.inner).double()
    W, b = weight_of(layer)
    for row, number, y in zip(x, index, layer(x), strict=True):
        here = slice(number - 1, number) if number else slice(0)
        pairs = zip(low_ranks(layer)[here], case.adapters[here], strict=True)
        reference = oracle.forward(W, b, oracle.exact(row).reshape(-1, case.inner), [update_of(*one) for one in pairs])
        assert gap(y, reference) < 1e-6  # scales are kept in fp32


@SLOW
@given(batch=batches(), length=st.integers(1, 4))
def test_a_flattened_batch_is_cut_into_its_rows(batch: Batch, length: int) -> None:
    case, index, _ = batch
    layer, state, _ = mixed(case, index, tokens=length)
    x = torch.randn(len(index), length, case.inner)
    flat = layer(x.flatten(0, 1))
    assert flat.shape == (len(index) * length, case.outer)
    assert torch.allclose(flat.view(*x.shape[:-1], -1), alone(layer, state, x, index), rtol=1e-4, atol=1e-4)
    if length > 1:
        with pytest.raises(AdapterStateError, match="a layer that sees some of the tokens only"):
            layer(x[:, 0])  # as many tokens as rows: one of each, or some expert's choice
    assert state.view.rows is not None
    state.change(rows=replace(state.view.rows, tokens=None))
    pooled = layer(x[:, 0])
    assert torch.allclose(pooled, alone(layer, state, x[:, 0], index), rtol=1e-4, atol=1e-4), "one token of each row"


@pytest.mark.parametrize("index", [[1, 1, 1, 1], [2], [0, 0], [0, 2, 1, 2]])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_rows_by_hand(index: list[int], shape: tuple[int, ...]) -> None:
    case = Case(adapters=(Adapter(1, 3.0), Adapter(6, 40.0, True, "bias")))
    layer, state, _ = mixed(case, index)
    x = torch.randn(len(index), *shape, 5)
    y = layer(x)
    assert torch.allclose(y, alone(layer, state, x, index), rtol=1e-5, atol=1e-5)
    state.change(rows=None)
    base = layer(x)
    for row, number in enumerate(index):
        assert torch.equal(y[row], base[row]) == (number == 0), "a row without an adapter is the base's, in its bits"


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_low_precision_are_as_good_as_alone(dtype: torch.dtype, autocast: bool) -> None:
    case = Case(inner=64, outer=48, adapters=(Adapter(4, 8.0), Adapter(8, 4.0, True, "bias"), Adapter(2, 3.0)))
    index = [0, 1, 2, 3, 1]
    layer, state, _ = mixed(case, index, dtype)
    x = torch.randn(5, 7, 64, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, apart = layer(x), alone(layer, state, x, index)
    assert y.dtype == apart.dtype
    W, b = weight_of(layer)
    updates = [update_of(*one) for one in zip(low_ranks(layer), case.adapters, strict=True)]
    for row, number in enumerate(index):
        mine = updates[number - 1 : number] if number else []
        reference = oracle.forward(W, b, oracle.exact(x[row]), mine)
        assert gap(y[row], reference) <= 1.2 * gap(apart[row], reference) + 1e-6


def test_a_scale_is_not_rounded_to_the_dtype_of_the_computation() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(1, 4)
    low_rank = LowRank(torch.ones(1, 1), torch.ones(4, 1), scale=1.2538)  # 1.25 in bf16
    bank = bank_of([low_rank], torch.bfloat16)
    assert bank is not None
    x = 1 + torch.rand(1, 512, 1).bfloat16()
    together = Rows(torch.tensor([0]), {layer: bank}).update(layer, x)
    assert together is not None
    exact = oracle.exact(x) * low_rank.scale
    bias, own = ((oracle.exact(y)[..., :1] - exact).mean() / exact.mean() for y in (together, low_rank(x)))
    assert abs(own) < 2**-10, "alone it is rounded up about as often as down"
    assert abs(bias) < 2**-10


SHAPES = [(4, 3, 5), (2, 5), (12, 5), (15, 5), (5,), (3, 3, 5), (6, 1, 5), (10, 1, 5)]


@pytest.mark.parametrize(("shape", "tokens"), [*itertools.product(SHAPES, [None, 2]), ((10, 5), None)])
def test_another_number_of_rows_is_refused(shape: tuple[int, ...], tokens: int | None) -> None:
    layer, _, _ = mixed(Case(), [0, 1, 1, 0, 1], tokens=tokens)
    with pytest.raises(AdapterStateError, match="5 rows have an adapter each") as caught:
        layer(torch.randn(shape))
    assert str(shape) in str(caught.value)


def test_a_layer_that_none_of_the_adapters_is_on_computes_the_base() -> None:
    layer, state, _ = mixed(Case(), [0, 1, 1])
    state.change(rows=Rows(torch.tensor([0, 1, 1]), {}))
    x = torch.randn(7, 5)
    y = layer(x)
    state.change(rows=None)
    assert torch.equal(y, layer(x))


def test_rows_of_no_tokens_come_back_empty() -> None:
    layer, _, _ = mixed(Case(), [0, 1, 1])
    assert layer(torch.zeros(3, 0, 5)).shape == (3, 0, 4)


def test_no_bank_without_an_update() -> None:
    assert bank_of([None, None], torch.float32) is None
    assert bank_of([], torch.float32) is None


def test_a_bank_holds_each_adapter_and_zeros_beside_it() -> None:
    torch.manual_seed(0)
    one, other = low_rank_of(Adapter(2, 3.0), 5, 4), low_rank_of(Adapter(3, 3.0, True, "bias"), 5, 4)
    with torch.no_grad():
        bank = bank_of([None, one, other], torch.bfloat16)
    assert bank is not None
    assert bank.bias is not None
    assert bank.A.shape == (3, 3, 5)
    assert bank.B.shape == (3, 4, 3)
    assert bank.A.dtype == bank.B.dtype == bank.bias.dtype == torch.bfloat16
    assert torch.equal(bank.A[1, :2], one.A.bfloat16())
    assert torch.equal(bank.B[2], other.B.bfloat16())
    assert not any(part.any() for part in (bank.A[0], bank.B[0], bank.A[1, 2:], bank.B[1, :, 2:], bank.bias[:2]))
    assert torch.allclose(bank.scale, torch.tensor([0.0, 1.5, 3.0 / 3**0.5]))
    bias = cast(Tensor, other.bias).detach()
    assert torch.allclose(bank.bias[2].float(), bias * other.scale, rtol=2**-8)


class Calls(TorchFunctionMode):
    """How often each function of torch is called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__qualname__", repr(func))
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", MIXABLE)
def test_the_work_does_not_grow_with_the_number_of_adapters(variant: str) -> None:
    counts = []
    for adapters in (1, 2, 9):
        case = Case(adapters=(Adapter(2, 4.0, variant=variant),) * adapters)
        layer, _, _ = mixed(case, [number % (adapters + 1) for number in range(12)])
        x = torch.randn(12, 3, 5)
        with Calls() as calls:
            layer(x)
        counts.append(calls.counts)
    assert sum(number for name, number in counts[0].items() if name.endswith("bmm")) == 2
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", ["A", "B", "bias"])
def test_a_stack_that_is_not_finite_says_so(part: str, value: float) -> None:
    stack = Stack(torch.ones(4, 3), torch.ones(5, 4), torch.ones(2, 5))
    assert stack.is_finite()
    assert stack._replace(bias=None).is_finite()
    getattr(stack, part)[1, 2] = value
    assert not stack.is_finite()
