"""Spectra from the factors alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.adapter import effective_rank, singular_values
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
