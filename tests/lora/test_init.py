"""How A and B start (BEHAVIOUR 8 and 10)."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import loratune as lt
from loratune.lora import generator_for, initial_factors


def factors(
    init: bool | str, *, r: int = 8, inner: int = 500, outer: int = 300, seed: int = 0
) -> tuple[Tensor, Tensor]:
    return initial_factors(init, r=r, in_features=inner, out_features=outer, generator=generator_for(seed, "x"))


def uniform(values: Tensor, bound: float) -> bool:
    """Whether values look like U(-bound, bound): range, mean, variance, fourth moment."""
    v = values.double().flatten() / bound
    n = len(v)
    return bool(
        v.abs().max() <= 1
        and v.abs().max() > 1 - 20 / n
        and v.mean().abs() < 4 * math.sqrt(1 / 3 / n)
        and (v.square().mean() - 1 / 3).abs() < 4 * math.sqrt(4 / 45 / n)
        and (v.pow(4).mean() - 1 / 5).abs() < 4 * math.sqrt(16 / 225 / n)
    )


def test_the_default_is_kaiming_uniform_and_zero() -> None:
    A, B = factors(True)
    assert A.shape == (8, 500)
    assert B.shape == (300, 8)
    assert not B.any()
    # Kaiming with a = √5: the bound is √(6 / ((1 + 5) · fan_in)) = 1 / √in.
    assert uniform(A, 1 / math.sqrt(500))
    expected = torch.empty(8, 500)
    nn.init.kaiming_uniform_(expected, a=math.sqrt(5))
    assert A.std() == pytest.approx(float(expected.std()), rel=0.1)


@pytest.mark.parametrize("r", [4, 16])
def test_gaussian_has_deviation_one_over_r(r: int) -> None:
    A, B = factors("gaussian", r=r)
    n = A.numel()
    v = A.double().flatten() * r
    assert v.mean().abs() < 4 / math.sqrt(n)
    assert v.square().mean() == pytest.approx(1, abs=4 * math.sqrt(2 / n))
    assert v.pow(4).mean() == pytest.approx(3, abs=4 * math.sqrt(96 / n)), "uniform numbers would give 1.8"
    assert not B.any()


def test_false_draws_both() -> None:
    A, B = factors(False)
    assert uniform(A, 1 / math.sqrt(500))
    assert uniform(B, 1 / math.sqrt(8))


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_fp32_on_the_cpu_whatever_the_defaults_are(init: bool | str) -> None:
    plain = factors(init)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            changed = factors(init)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(plain, changed, strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a, b)


def model(*names: str) -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(6, 6) for name in names})


def drawn(seed: int, *targets: str, names: tuple[str, ...] = ("a", "b"), noise: int = 0) -> dict[str, Tensor]:
    base = model(*names)
    torch.manual_seed(seed)
    random.seed(noise)
    np.random.seed(noise)
    torch.rand(noise)
    handle = lt.attach(base, lt.LoraConfig(target_modules=targets or names))
    return {path: low_rank.A.detach() for path, low_rank in handle.factors().items()}


def test_the_seed_decides_and_nothing_else_does() -> None:
    first = drawn(0)
    for other in (drawn(0, noise=17), drawn(0, names=("z", "b", "a"), noise=3)):
        assert torch.equal(first["a"], other["a"])
        assert torch.equal(first["b"], other["b"])
    assert not torch.equal(first["a"], drawn(1)["a"])
    assert not torch.equal(first["a"], first["b"]), "each module has numbers of its own"


def test_one_target_does_not_shift_another() -> None:
    assert torch.equal(drawn(0)["b"], drawn(0, "b")["b"])


def test_a_second_adapter_starts_elsewhere() -> None:
    torch.manual_seed(0)
    handle = lt.attach(model("a"), lt.LoraConfig(target_modules=("a",)))
    handle.add(lt.LoraConfig(target_modules=("a",)), "second")
    first, second = (handle.factors(name)["a"].A for name in ("default", "second"))
    assert not torch.equal(first, second)


def test_attaching_draws_nothing_from_the_users_generator() -> None:
    one = model("a")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    lt.attach(one, lt.LoraConfig(target_modules=("a",)))
    assert torch.equal(torch.rand(3), expected)
