"""Spectra from the factors alone; what is unused or broken is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loratune.adapter import Factors, effective_rank, inspect, read_adapter, singular_values, write_adapter
from tests.adapter.values import adapter, dense_of
from tests.oracle import algebra
from tests.oracle import lora_reference as oracle


@settings(derandomize=True, deadline=None, max_examples=40, database=None)
@given(r=st.integers(1, 6), inner=st.integers(1, 9), outer=st.integers(1, 9), seed=st.integers(0, 999))
def test_against_the_dense_matrix(r: int, inner: int, outer: int, seed: int) -> None:
    torch.manual_seed(seed)
    A, B = torch.randn(r, inner), torch.randn(outer, r)
    update = oracle.Update(oracle.exact(A), oracle.exact(B), 1.0)
    dense = np.linalg.svd(oracle.dense(update), compute_uv=False)
    ours = singular_values(A, B).numpy()
    both = min(len(ours), len(dense))
    assert np.allclose(ours[:both], dense[:both], rtol=1e-9, atol=1e-9 * dense[0])
    assert np.all(ours[both:] < 1e-9 * dense[0])
    assert np.all(np.abs(dense[both:]) < 1e-9 * dense[0])
    assert effective_rank(A, B) == pytest.approx(oracle.effective_rank(update), rel=1e-6)


def test_known_ranks() -> None:
    eye = torch.eye(4, 10)
    assert effective_rank(eye, torch.eye(7, 4)) == pytest.approx(4)
    assert effective_rank(eye, torch.eye(7, 4) * torch.tensor([1.0, 0, 0, 0])) == pytest.approx(1)
    assert effective_rank(eye, torch.zeros(7, 4)) == 0.0
    assert effective_rank(3 * eye, -2 * torch.eye(7, 4)) == pytest.approx(4), "size and sign do not matter"
    # Shares 1/2, 1/4, 1/4: entropy 1.5 bits.
    assert effective_rank(eye, torch.eye(7, 4) * torch.tensor([2.0, 1, 1, 0])) == pytest.approx(2**1.5)
    assert effective_rank(eye.bfloat16(), torch.eye(7, 4).bfloat16()) == pytest.approx(4)


# -- inspect ---------------------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=40, database=None)
@given(
    r=st.integers(1, 6),
    inner=st.integers(1, 9),
    outer=st.integers(1, 9),
    alpha=st.floats(0.1, 64),
    rslora=st.booleans(),
    seed=st.integers(0, 999),
)
def test_inspect_against_the_dense_matrix(
    r: int, inner: int, outer: int, alpha: float, rslora: bool, seed: int
) -> None:
    made = adapter({"m": (r, inner, outer)}, alpha=alpha, rslora=rslora, seed=seed)
    dense = dense_of(made)["m"]
    (module,) = inspect(made).modules
    found = module.spectrum
    assert found is not None
    sigma = np.linalg.svd(dense, compute_uv=False)
    both = min(r, inner, outer)
    assert len(found.singular_values) == both
    assert np.allclose(found.singular_values, sigma[:both], rtol=1e-9, atol=1e-12 * sigma[0])
    assert found.norm == pytest.approx(algebra.norm(dense), rel=1e-12)
    assert found.effective_rank == pytest.approx(algebra.effective_rank(dense), rel=1e-9)
    assert found.stable_rank == pytest.approx(algebra.stable_rank(dense), rel=1e-9)
    assert found.dead == r - np.linalg.matrix_rank(dense, rtol=1e-6)
    assert module.parameters == r * (inner + outer)
    assert (module.r, module.inner, module.outer) == (r, inner, outer)


def test_inspect_totals_and_order() -> None:
    made = adapter({f"layers.{i}.q": (2, 3, 4) for i in (10, 2, 1)}, bias=True)
    found = inspect(made)
    assert [module.path for module in found.modules] == ["layers.1.q", "layers.2.q", "layers.10.q"]
    assert found.parameters == 3 * (2 * 7 + 4)
    assert found.norm == pytest.approx(np.sqrt(sum(algebra.norm(d) ** 2 for d in dense_of(made).values())))
    assert all(module.beside == ("bias",) for module in found.modules)
    assert found.non_finite == ()


def test_inspect_uses_the_patterns() -> None:
    made = adapter({"a.q": (2, 3, 4), "a.v": (3, 3, 4)}, alpha=5, alpha_pattern={"v": 12.0})
    assert [module.scale for module in inspect(made).modules] == [5 / 2, 12 / 3]
    assert inspect(made).modules[1].spectrum.norm == pytest.approx(algebra.norm(dense_of(made)["a.v"]))  # type: ignore[union-attr]


def test_dead_directions() -> None:
    made = adapter({"m": (4, 6, 5)})
    A, B, *_ = made.factors["m"]
    A[0] = 0
    B[:, 2] = 0
    A[3] = A[1]  # two components of one direction: three of four directions are dead, two of them plainly
    B[:, 3] = B[:, 1]
    (module,) = inspect(made).modules
    assert module.zero_components == (0, 2)
    assert module.spectrum is not None
    assert module.spectrum.dead == 3
    assert module.spectrum.stable_rank == pytest.approx(1)
    B.zero_()
    (module,) = inspect(made).modules
    assert module.spectrum is not None
    assert (module.spectrum.dead, module.spectrum.norm, module.spectrum.stable_rank) == (4, 0.0, 0.0)
    assert module.zero_components == (0, 1, 2, 3)


def test_small_is_not_dead_and_negligible_is() -> None:
    def dead(smallest: float) -> int:
        factors = Factors(torch.eye(2, 5), torch.eye(4, 2) * torch.tensor([1.0, smallest]))
        (module,) = inspect(replace(adapter({"m": (2, 5, 4)}), factors={"m": factors})).modules
        assert module.spectrum is not None
        return module.spectrum.dead

    assert (dead(2e-6), dead(5e-7)) == (0, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damage_is_named(bad: float, tmp_path: Path) -> None:
    made = adapter({"a.q": (2, 3, 4), "a.v": (2, 3, 4)}, bias=True)
    write_adapter(tmp_path, made, card="")
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.a.q.lora_B.weight"][1, 1] = bad
    tensors["base_model.model.a.v.lora_B.bias"][0] = bad
    save_file(tensors, path, metadata={"format": "pt"})
    found = inspect(read_adapter(tmp_path, finite=False))
    assert found.non_finite == ("a.q: B", "a.v: bias")
    q, v = found.modules
    assert q.spectrum is None
    assert v.spectrum is not None
    assert found.norm is None


def test_what_stands_beside_is_listed() -> None:
    made = adapter({"a.q": (2, 3, 4)})
    A, B, *_ = made.factors["a.q"]
    dora = replace(
        made, factors={"a.q": Factors(A, B, None, torch.ones(4))}, replaced={"head.weight": torch.ones(2, 2)}
    )
    found = inspect(dora)
    assert found.modules[0].beside == ("magnitude",)
    assert found.replaced == ("head.weight",)
    assert found.parameters == 2 * 7 + 4 + 4
