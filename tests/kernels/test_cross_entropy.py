"""Cross-entropy and its derivative in C against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loratune.kernels import c_blocks

ROUNDED = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


def found_for(logits: Tensor, targets: Tensor, times: Tensor | None = None) -> tuple[Tensor, Tensor]:
    slope = torch.full(logits.shape, torch.nan, dtype=logits.dtype)
    return c_blocks.cross_entropy(logits, targets, times, slope), slope


def exact_for(logits: Tensor, targets: Tensor, times: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = logits.double().requires_grad_()
    lost = F.cross_entropy(wide, targets, reduction="none") * (1 if times is None else times.double())
    return lost.detach(), torch.autograd.grad(lost.sum(), wide)[0]


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("choices", [1, 2, 15, 16, 17, 511, 512, 513, 49152])
@pytest.mark.parametrize("spread", [0.1, 12.0])
@pytest.mark.parametrize("often", [False, True])
def test_of_any_width(dtype: torch.dtype, choices: int, spread: float, often: bool) -> None:
    torch.manual_seed(choices)
    logits = (torch.randn(9, choices) * spread + 40).to(dtype)
    targets = torch.randint(choices, (9,))
    times = torch.rand(9) * 3 if often else None
    lost, slope = found_for(logits, targets, times)
    right, derivative = exact_for(logits, targets, times)
    torch.testing.assert_close(lost.double(), right, rtol=2e-6, atol=4e-6)
    torch.testing.assert_close(slope.double(), derivative, rtol=ROUNDED[dtype], atol=3e-7)
    assert (lost.dtype, slope.dtype) == (torch.float32, dtype)


@pytest.mark.parametrize("dtype", ROUNDED)
def test_what_is_ruled_out_has_no_share(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [-torch.inf, -torch.inf, 3.0], [0.0, -torch.inf, 1.0]], dtype=dtype)
    lost, slope = found_for(logits, torch.tensor([0, 2, 1]))
    assert (slope[:2, 1] == 0).all()
    assert (lost[1], slope[1].tolist()) == (0, [0, 0, 0])
    assert lost[2] == torch.inf
    assert slope[2, 1] == -1


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_what_is_no_number_is_seen(odd: float) -> None:
    logits = torch.zeros(3, 600)
    logits[1, 555] = odd
    lost, slope = found_for(logits, torch.tensor([0, 0, 0]))
    assert lost.isnan().tolist() == [False, True, False]
    assert slope.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("target", [-1, 5, 2**40])
def test_a_target_that_is_none_of_the_choices(target: int) -> None:
    logits, slope = torch.zeros(2, 5), torch.full((2, 5), 7.0)
    with pytest.raises(IndexError, match="none of the 5 choices"):
        c_blocks.cross_entropy(logits, torch.tensor([0, target]), None, slope)
    assert (slope == 7).all()


@pytest.mark.parametrize("certain", [False, True])
def test_the_others_are_not_lost_beside_a_token_that_is_nearly_certain(certain: bool) -> None:
    """Log-probability and 1 - p are made of what is left, which is below a unit in the last place of 1."""
    logits = torch.randn(3, 512)
    logits[:, 7] = 20.0
    targets = torch.full((3,), 7 if certain else 8)
    for mine, right in zip(found_for(logits, targets), exact_for(logits, targets, None), strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=3e-6, atol=0)


def test_long_sums_keep_their_digits() -> None:
    torch.manual_seed(0)
    logits, targets = torch.rand(4, 1_000_000), torch.arange(4)
    lost, slope = found_for(logits, targets)
    right, _ = exact_for(logits, targets, None)
    assert float((lost.double() - right).abs().max()) < 1e-6
    assert float(slope.double().sum(1).abs().max()) < 1e-7


def test_threads_change_no_bit() -> None:
    logits, targets = torch.randn(7, 5000), torch.randint(5000, (7,))
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(found_for(logits, targets))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_rows_that_do_not_lie_together() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(40, 6).T, torch.randint(40, (12,))[::2]
    for mine, right in zip(found_for(logits, targets), exact_for(logits, targets, None), strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=2e-6, atol=1e-6)
