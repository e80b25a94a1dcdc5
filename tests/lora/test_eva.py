"""Directions that explain most, against the singular value decomposition of everything at once; and ranks by them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratune.lora.eva import Directions, Seen, eva_factors, ranks_by_explained


def vectors(count: int, features: int, rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    strengths = 0.5 ** torch.arange(rank, dtype=torch.float64)
    return numbers(count, rank) * strengths @ torch.linalg.qr(numbers(features, rank))[0].T


def seen_in_parts(x: Tensor, width: int, sizes: list[int]) -> Directions:
    seen = Seen(width)
    for part in x.split([*sizes, len(x) - sum(sizes)]):
        seen.add(part)
    return seen.directions()


@settings(deadline=None)
@given(
    st.integers(1, 6), st.integers(6, 9), st.integers(20, 60), st.lists(st.integers(0, 9), max_size=2), st.integers()
)
def test_is_the_decomposition_of_everything(rank: int, width: int, count: int, sizes: list[int], seed: int) -> None:
    """Where no more dimensions are spanned than are kept; signs are free."""
    x = vectors(count, 12, rank, seed % 1000)
    found = seen_in_parts(x, width, sizes)
    _, S, Vh = torch.linalg.svd(x, full_matrices=False)
    assert len(found.rows) == rank
    torch.testing.assert_close(found.explained, (S**2 / (S**2).sum())[:rank], rtol=1e-6, atol=1e-12)
    alike = (found.rows.double() * Vh[:rank]).sum(1).abs()
    torch.testing.assert_close(alike, torch.ones(rank, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.rows @ found.rows.T, torch.eye(rank), rtol=0, atol=1e-5)


def test_more_dimensions_than_are_kept() -> None:
    """What is cut off early may matter later; of what decays, hardly anything is lost."""
    x = vectors(400, 40, 40, seed=3)
    found = seen_in_parts(x, 8, [50, 50, 100])
    _, S, _ = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(found.explained, (S**2 / (S**2).sum())[:8], rtol=2e-2, atol=0)


def test_means_are_not_taken_off() -> None:
    """A multiplies inputs as they are: a direction that all have in common explains them all."""
    x = torch.ones(30, 5) + 1e-3 * torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    found = seen_in_parts(x, 2, [])
    assert float(found.explained[0]) > 0.999
    torch.testing.assert_close(found.rows[0].abs(), torch.full((5,), 5**-0.5), rtol=1e-2, atol=0)


def test_more_vectors_than_features() -> None:
    seen = Seen(100)
    seen.add(vectors(90, 10, 10, seed=1))
    assert seen.directions().rows.shape == (10, 10)


def test_nothing_but_zeros() -> None:
    seen = Seen(3)
    seen.add(torch.zeros(4, 5))
    assert len(seen.directions().rows) == 0


SHARES = {"a": torch.tensor([0.6, 0.3, 0.05, 0.01]), "b": torch.tensor([0.3, 0.2, 0.2, 0.15])}


def test_ranks_go_where_they_explain() -> None:
    """Of eight: one each, then a's 0.3, b's 0.2, 0.2 and 0.15; the limit is twice as many."""
    assert ranks_by_explained({"a": 3, "b": 3}, SHARES, most=2.0) == {"a": 2, "b": 4}
    assert ranks_by_explained({"a": 2, "b": 2}, SHARES, most=2.0) == {"a": 2, "b": 2}
    assert ranks_by_explained({"a": 3, "b": 3}, SHARES, most=1.0) == {"a": 3, "b": 3}


@settings(deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=5), st.floats(1.0, 3.0), st.integers(0, 99))
def test_no_more_ranks_than_before(ranks: list[int], most: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    own = {str(i): r for i, r in enumerate(ranks)}
    shares = {path: torch.rand(30, generator=generator).sort(descending=True).values for path in own}
    found = ranks_by_explained(own, shares, most)
    assert sum(found.values()) == sum(ranks)
    assert all(1 <= found[path] <= int(most * own[path]) for path in own)


def test_factors() -> None:
    directions = Directions(torch.eye(4), torch.tensor([0.4, 0.3, 0.2, 0.1]))
    A, B = eva_factors(directions, 2, 5)
    assert torch.equal(A, torch.eye(4)[:2])
    assert torch.equal(B, torch.zeros(5, 2))
    A.zero_()
    assert float(directions.rows.sum()) == pytest.approx(4), "A is its own"
