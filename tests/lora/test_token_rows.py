"""An adapter for each token, whatever rows these stand in: as if it went through its own adapter alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from loratune.errors import AdapterStateError
from loratune.lora import Blocked, LowRank, Stack, Stacks, TokenRows, bank_of, blocks_help
from tests.lora.cases import SLOW, Adapter, adapters_of, low_rank_of

INNER = 6


class Several(NamedTuple):
    """Adapters of some layers that see the same x; a layer may have none of one. The adapter of each token, or -1."""

    outers: list[int]
    adapters: list[list[Adapter | None]]
    tokens: list[int]


@st.composite
def several(draw: st.DrawFn) -> Several:
    number = draw(st.integers(1, 4))
    outers = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    one = st.one_of(st.none(), adapters_of("plain", "bias", "start"))
    adapters = [draw(st.lists(one, min_size=number, max_size=number)) for _ in outers]
    return Several(outers, adapters, draw(st.lists(st.integers(-1, number - 1), min_size=1, max_size=8)))


def made(case: Several, dtype: torch.dtype) -> tuple[list[nn.Module], list[list[LowRank | None]], Stacks]:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Identity() for _ in case.outers]
    low_ranks = [
        [None if adapter is None else low_rank_of(adapter, INNER, outer) for adapter in some]
        for outer, some in zip(case.outers, case.adapters, strict=True)
    ]
    stacks = {}
    for layer, some in zip(layers, low_ranks, strict=True):
        bank = bank_of(some, torch.promote_types(dtype, torch.float32))
        if bank is not None:
            stacks[layer] = Stack.of(bank, dtype)
    return layers, low_ranks, Stacks(stacks, len(case.adapters[0]))


def others(tokens: list[int], adapters: int) -> Tensor:
    return torch.tensor(tokens)[:, None] != torch.arange(adapters)


def expected(x: Tensor, ys: list[Tensor], low_ranks: list[list[LowRank | None]], tokens: list[int]) -> list[Tensor]:
    out = []
    for y, some in zip(ys, low_ranks, strict=True):
        rows = []
        for one, given_y, number in zip(x.double(), y.double(), tokens, strict=True):
            low_rank = some[number] if number >= 0 else None
            rows.append(given_y if low_rank is None else given_y + low_rank.double()(one[None])[0])
        out.append(torch.stack(rows))
    return out


@SLOW
@given(case=several())
@torch.no_grad()
def test_each_token_has_its_own_adapter(case: Several) -> None:
    layers, low_ranks, stacks = made(case, torch.float64)
    x = torch.randn(len(case.tokens), INNER, dtype=torch.float64)
    ys = [torch.randn(len(x), outer, dtype=torch.float64) for outer in case.outers]
    right = expected(x, ys, low_ranks, case.tokens)
    rows = TokenRows(others(case.tokens, len(case.adapters[0])), stacks)
    for mine, exact in zip(rows.added(layers, x, [y.clone() for y in ys]), right, strict=True):
        assert torch.allclose(mine, exact, rtol=1e-6, atol=1e-5)


@SLOW
@given(case=several())
@torch.no_grad()
def test_those_that_are_there_alone(case: Several) -> None:
    """The same with stacks of the adapters that some token has, in another order of numbers."""
    layers, low_ranks, stacks = made(case, torch.float64)
    present = sorted({number for number in case.tokens if number >= 0})
    x = torch.randn(len(case.tokens), INNER, dtype=torch.float64)
    ys = [torch.randn(len(x), outer, dtype=torch.float64) for outer in case.outers]
    right = expected(x, ys, low_ranks, case.tokens)
    renumbered = [present.index(number) if number >= 0 else -1 for number in case.tokens]
    rows = TokenRows(others(renumbered, len(present)), stacks.of_some(present))
    for mine, exact in zip(rows.added(layers, x, [y.clone() for y in ys]), right, strict=True):
        assert torch.allclose(mine, exact, rtol=1e-6, atol=1e-5)


@torch.no_grad()
def test_bf16_is_rounded_once_with_its_scale() -> None:
    """A scale that is no power of two costs no more than B's own rounding does."""
    case = Several([64], [[Adapter(4, 5)]], [0] * 32)
    layers, low_ranks, stacks = made(case, torch.bfloat16)
    x = torch.randn(32, INNER).bfloat16()
    (right,) = expected(x, [torch.zeros(32, 64)], low_ranks, case.tokens)
    rows = TokenRows(others(case.tokens, 1), stacks)
    (mine,) = rows.added(layers, x, [torch.zeros(32, 64, dtype=torch.bfloat16)])
    assert float((mine.double() - right).norm() / right.norm()) < 6e-3


@torch.no_grad()
def test_what_overflows_in_anothers_adapter_reaches_nobody_else() -> None:
    case = Several([3], [[Adapter(2, 2), Adapter(2, 2)]], [0, 1, -1])
    layers, _, stacks = made(case, torch.float32)
    layer = layers[0]
    stack = stacks.by_layer[layer]
    stack.A[:2] = 1e38
    rows = TokenRows(others(case.tokens, 2), stacks)
    (y,) = rows.added(layers, torch.full((3, INNER), 10.0), [torch.zeros(3, 3)])
    assert not y[0].isfinite().all()
    assert y[1].isfinite().all()
    assert torch.equal(y[2], torch.zeros(3))


def test_another_number_of_tokens_is_refused() -> None:
    layers, _, stacks = made(Several([3], [[Adapter(2, 2)]], [0, 0]), torch.float32)
    with pytest.raises(AdapterStateError, match="2 tokens have an adapter each, and a layer was given"):
        TokenRows(others([0, 0], 1), stacks).added(layers, torch.ones(1, 3, INNER), [torch.ones(1, 3, 3)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any number of tokens, beside a bias, on top of something, and for a slice of a wider tensor."""
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 40).to(dtype), torch.randn(48).to(dtype)
    blocked = Blocked(weight)
    assert blocked.in_blocks == blocks_help(weight)
    for tokens in (1, 5, 32, 200):
        wide = torch.randn(tokens, 100).to(dtype)
        x, y = wide[:, 7:47], torch.randn(tokens, 48).to(dtype)
        exact = x.double() @ weight.double().T
        for mine, right in (
            (blocked.times(x), exact),
            (blocked.times(x[None])[0], exact),
            (blocked.times(x, bias), exact + bias.double()),
            (blocked.added(y.clone(), x), exact + y.double()),
        ):
            assert float((mine.double() - right).norm() / right.norm()) < (5e-3 if dtype == torch.bfloat16 else 1e-6)


def test_without_such_kernels_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratune.lora.blocked._supported", lambda: False)
    weight: Any = torch.randn(8, 4).bfloat16()
    assert not Blocked(weight).in_blocks
    assert torch.equal(Blocked(weight).times(torch.ones(2, 4).bfloat16()), weight.sum(1).expand(2, 8))


@torch.no_grad()
def test_stacks_of_some_that_are_not_the_first() -> None:
    case = Several([3, 2], [[Adapter(2, 3)] * 5, [None, Adapter(2, 3), Adapter(1, 1), None, Adapter(3, 2)]], [3, 1, -1])
    layers, low_ranks, stacks = made(case, torch.float64)
    x, ys = torch.randn(3, INNER).double(), [torch.zeros(3, 3).double(), torch.zeros(3, 2).double()]
    right = expected(x, ys, low_ranks, case.tokens)
    rows = TokenRows(others([1, 0, -1], 2), stacks.of_some([1, 3]))
    for mine, exact in zip(rows.added(layers, x, ys), right, strict=True):
        assert torch.allclose(mine, exact, rtol=1e-6, atol=1e-5)
