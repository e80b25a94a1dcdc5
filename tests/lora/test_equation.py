"""Scale, counts, and the dense delta."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.lora import LowRank, lora_parameters, scale_of
from tests.oracle import lora_reference as oracle


@settings(derandomize=True, database=None)
@given(r=st.integers(1, 512), alpha=st.floats(1e-3, 1e3), rslora=st.booleans())
def test_the_scale(r: int, alpha: float, rslora: bool) -> None:
    assert scale_of(r, alpha, rslora) == pytest.approx(oracle.scale(r, alpha, rslora=rslora), rel=1e-15)


def test_the_scale_by_hand() -> None:
    assert scale_of(8, 16) == 2.0
    assert scale_of(16, 16, rslora=True) == 4.0


@pytest.mark.parametrize(
    ("d", "k", "r", "expected"),
    [(768, 768, 8, 12_288), (4096, 4096, 16, 131_072), (512, 512, 8, 8_192), (3, 5, 2, 16)],
)
def test_parameters_of_one_projection(d: int, k: int, r: int, expected: int) -> None:
    assert lora_parameters(d, k, r) == expected
    low_rank = LowRank(torch.empty(r, k, device="meta"), torch.empty(d, r, device="meta"), scale=1.0)
    assert sum(p.numel() for p in low_rank.parameters()) == expected


@settings(derandomize=True, deadline=None, database=None, max_examples=30)
@given(r=st.integers(1, 6), inner=st.integers(1, 8), outer=st.integers(1, 8), seed=st.integers(0, 999))
def test_the_dense_delta(r: int, inner: int, outer: int, seed: int) -> None:
    torch.manual_seed(seed)
    low_rank = LowRank(torch.randn(r, inner), torch.randn(outer, r), scale=1.7)
    expected = oracle.dense(oracle.Update(oracle.exact(low_rank.A), oracle.exact(low_rank.B), 1.7))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-14)):
        delta = low_rank.delta(torch.zeros(outer, inner, dtype=dtype))
        assert delta.dtype == dtype
        assert not delta.requires_grad
        assert np.linalg.norm(oracle.exact(delta) - expected) <= tolerance * np.linalg.norm(expected)


def test_half_an_adapter_in_a_checkpoint_is_reported() -> None:
    low_rank = LowRank(torch.zeros(2, 3), torch.zeros(4, 2), scale=1.0)
    assert not low_rank.load_state_dict({}).missing_keys, "a checkpoint of the base alone"
    with pytest.raises(RuntimeError, match=r'Missing key.*"B"'):
        low_rank.load_state_dict({"A": torch.ones(2, 3)})
    with pytest.raises(RuntimeError, match="size mismatch for A"):
        low_rank.load_state_dict({"A": torch.ones(2, 5), "B": torch.ones(4, 2)})
    low_rank.load_state_dict({"A": torch.ones(2, 3), "B": torch.ones(4, 2)})
    assert low_rank.A.sum() == 6


@pytest.mark.parametrize("alone", ["magnitude", "bias", "A0"])
def test_a_tensor_without_a_and_b_in_a_checkpoint_is_reported(alone: str) -> None:
    A, B = torch.zeros(2, 3), torch.zeros(4, 2)
    beside = {"magnitude": torch.ones(4)} if alone == "magnitude" else {"bias": torch.zeros(4)}
    low_rank = LowRank(A, B, scale=1.0, start=(A.clone(), B.clone()), **beside)
    with pytest.raises(RuntimeError, match="Missing key"):
        low_rank.load_state_dict({alone: low_rank.state_dict()[alone]})
