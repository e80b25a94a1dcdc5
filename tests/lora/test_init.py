"""How A and B start (BEHAVIOUR 8 and 10)."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

import loratune as lt
from loratune.lora import decomposed_factors, generator_for, initial_factors
from loratune.lora.init import leading_directions
from tests.oracle import algebra
from tests.oracle.lora_reference import Array, exact


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


def test_swapped_is_the_default_with_the_zeros_in_a() -> None:
    A, B = factors("swapped")
    assert not A.any()
    assert A.shape == (8, 500)
    assert uniform(B, 1 / math.sqrt(8))


@pytest.mark.parametrize("r", [2, 8, 32])
def test_orthogonal_draws_both_with_a_product_of_zero(r: int) -> None:
    A, B = factors("orthogonal", r=r)
    assert A.shape == (r, 500)
    assert B.shape == (300, r)
    assert (B @ A).norm() < 1e-5 * A.norm() * B.norm()
    for factor in (A, B):
        # r / 2 orthonormal rows of normal numbers over 10: ‖·‖² of r numbers is r / 2 / 100 on average.
        n = factor.numel() / 2
        assert factor.double().square().mean() == pytest.approx(0.005, rel=5 * math.sqrt(2 / n))
        assert np.linalg.matrix_rank(exact(factor), rtol=1e-5) == r // 2


@pytest.mark.parametrize("init", [True, "gaussian", "swapped", "orthogonal", False])
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


# -- from a decomposition --------------------------------------------------------------------------------------------

DECOMPOSED = ("pissa", "pissa_niter_4", "olora")


def weight(outer: int = 24, inner: int = 36, *, decay: float = 0.9) -> Tensor:
    """Singular values fall by `decay` from one to the next."""
    torch.manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(outer, outer))
    V, _ = torch.linalg.qr(torch.randn(inner, inner))
    n = min(outer, inner)
    return (U[:, :n] * decay ** torch.arange(float(n))) @ V[:, :n].T


def decomposed(init: str, W: Tensor, *, r: int = 6, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    A, B = decomposed_factors(init, W, r=r, scale=scale, generator=generator_for(seed, "x"))
    assert A.shape == (r, W.shape[1])
    assert B.shape == (W.shape[0], r)
    assert A.dtype == B.dtype == torch.float32
    return A, B


def missed(init: str, W: Tensor, best: Array) -> float:
    """How far the product is from W, as a multiple of how far the best one of its rank is, above that."""
    A, B = decomposed(init, W)
    W64 = exact(W)
    return algebra.norm(W64 - 2.0 * exact(B) @ exact(A)) / algebra.norm(W64 - best) - 1


@pytest.mark.parametrize("shape", [(24, 36), (36, 24), (20, 20)])
@pytest.mark.parametrize("scale", [0.5, 1.0, 17 / 9])
def test_pissa_is_the_best_of_its_rank_with_shared_singular_values(shape: tuple[int, int], scale: float) -> None:
    W = weight(*shape)
    A, B = decomposed("pissa", W, scale=scale)
    best = algebra.best_of_rank(exact(W), 6)
    assert algebra.relative_error(best, scale * exact(B) @ exact(A)) < 1e-5
    shared = np.diag(np.linalg.svd(exact(W), compute_uv=False)[:6] / scale)
    assert np.allclose(exact(A) @ exact(A).T, shared, atol=1e-5)
    assert np.allclose(exact(B).T @ exact(B), shared, atol=1e-5)


def test_pissa_by_subspace_iteration_comes_closer_with_each_round() -> None:
    W = weight(80, 100, decay=0.97)
    best = algebra.best_of_rank(exact(W), 6)
    far = [missed(f"pissa_niter_{rounds}", W, best) for rounds in (1, 2, 4, 16)]
    assert all(more > less > -1e-6 for more, less in itertools.pairwise(far)), far
    assert far[0] > 1e-4, "one round is an approximation"
    assert far[-1] < 1e-5


@pytest.mark.parametrize("r", [19, 20])
def test_pissa_by_subspace_iteration_at_full_rank(r: int) -> None:
    W = weight(20, 30)
    A, B = decomposed("pissa_niter_2", W, r=r)
    assert algebra.relative_error(algebra.best_of_rank(exact(W), r), 2.0 * exact(B) @ exact(A)) < 1e-5


@pytest.mark.parametrize("shape", [(24, 36), (36, 24)])
def test_olora_is_the_leading_part_of_qr(shape: tuple[int, int]) -> None:
    W = weight(*shape)
    A, B = decomposed("olora", W)
    Q, R = np.linalg.qr(exact(W))
    assert algebra.relative_error(Q[:, :6] @ R[:6], exact(B) @ exact(A)) < 1e-5
    assert np.allclose(exact(B).T @ exact(B), np.eye(6), atol=1e-5)
    assert np.allclose(np.tril(exact(A), -1), 0, atol=1e-6)


@pytest.mark.parametrize("init", DECOMPOSED)
def test_a_decomposition_does_not_depend_on_what_surrounds_it(init: str) -> None:
    W = weight()
    kept = W.clone()
    state = torch.get_rng_state()
    first = decomposed(init, W)
    assert torch.equal(torch.get_rng_state(), state), "torch's generator is left alone"
    torch.rand(3)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            second = decomposed(init, W)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(W, kept)


@pytest.mark.parametrize("init", DECOMPOSED)
def test_a_decomposition_of_a_bf16_weight_is_done_in_fp32(init: str) -> None:
    W = weight().bfloat16()
    for ours, same in zip(decomposed(init, W), decomposed(init, W.float()), strict=True):
        assert torch.equal(ours, same)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_peft_starts_with_the_same_product(init: str) -> None:
    W = weight()
    theirs = nn.Sequential(nn.Linear(36, 24, bias=False))
    theirs[0].weight.data.copy_(W)
    config = peft.LoraConfig(target_modules=["0"], r=6, lora_alpha=12, init_lora_weights=init)
    layer = peft.get_peft_model(theirs, config).base_model.model[0]
    product = exact(layer.lora_B["default"].weight) @ exact(layer.lora_A["default"].weight)
    A, B = decomposed(init, W, scale=2.0)
    assert algebra.relative_error(product, exact(B) @ exact(A)) < 1e-5


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_peft_draws_from_the_same_distribution(init: bool | str) -> None:
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(500, 300))
    config = peft.LoraConfig(target_modules=["0"], r=8, lora_alpha=8, init_lora_weights=init)
    layer = peft.get_peft_model(theirs, config).base_model.model[0]
    for ours, peers in zip(factors(init), (layer.lora_A, layer.lora_B), strict=True):
        a, b = ours.double().flatten(), peers["default"].weight.detach().double().flatten()
        assert a.square().mean() == pytest.approx(float(b.square().mean()), rel=0.15)
        assert a.pow(4).mean() == pytest.approx(float(b.pow(4).mean()), rel=0.4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_leading_directions_are_those_of_the_whole_decomposition(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    W = torch.randn(40, 5, dtype=dtype) @ torch.diag(torch.tensor([9.0, 5.0, 3.0, 1.0, 0.5], dtype=dtype))
    W = W @ torch.linalg.qr(torch.randn(30, 5, dtype=dtype))[0].T
    U, sigma, Vh = leading_directions(W, 7, rounds=6, generator=generator_for(0))
    assert (U.shape, sigma.shape, Vh.shape) == ((40, 7), (7,), (7, 30))
    assert {U.dtype, sigma.dtype, Vh.dtype} == {dtype}
    near = 1e-5 if dtype == torch.float32 else 1e-13
    assert float((U * sigma @ Vh - W).norm() / W.norm()) < near
    assert torch.allclose(sigma[:5], torch.linalg.svdvals(W)[:5], rtol=near)
    assert leading_directions(W, 99, rounds=1, generator=generator_for(0))[1].shape == (30,)
