"""VeRA's vectors and the projections that all layers share, apart from any model."""

from __future__ import annotations

import math

import torch

from loratune.lora.equation import LowRank
from loratune.lora.vera import Projections, Vera, of_same_input, random_projections


def drawn(r: int = 3, widest: tuple[int, int] = (6, 8)) -> Projections:
    return Projections(*random_projections(r, *widest, seed=0))


def vera(projections: Projections, in_features: int = 4, out: int = 5, dtype: torch.dtype = torch.float32) -> Vera:
    r = len(projections.A)
    d, b = torch.arange(1.0, r + 1).to(dtype), torch.arange(1.0, out + 1).to(dtype)
    return Vera(d, b, projections, in_features, 0.25)


def test_factors_are_the_vectors_times_the_first_rows_and_columns() -> None:
    projections = drawn()
    layer = vera(projections)
    A, B = layer.factors()
    torch.testing.assert_close(A, torch.diag(layer.d) @ projections.A[:, :4])
    torch.testing.assert_close(B, torch.diag(layer.b) @ projections.B[:5])
    assert (layer.r, layer.scale, layer.dropout) == (3, 1.0, 0.25)
    assert layer.inner is layer.d
    assert layer.outer is layer.b
    assert layer.extra_repr() == "r=3, in=4, out=5, dropout=0.25"


def test_factors_are_of_the_vectors_dtype_or_the_one_asked_for() -> None:
    layer = vera(drawn(), dtype=torch.bfloat16)
    assert [t.dtype for t in layer.factors()] == [torch.bfloat16] * 2
    found = layer.factors(torch.float64)
    assert [t.dtype for t in found] == [torch.float64] * 2
    exact = layer.d.double()[:, None] * layer.projections.A[:, :4].double()
    torch.testing.assert_close(found[0], exact, rtol=0, atol=0)  # multiplied in what was asked for


def test_projections_are_drawn_as_kaiming_has_it() -> None:
    A, B = random_projections(64, 100, 400, seed=3)
    assert A.shape == (64, 100)
    assert B.shape == (400, 64)
    for tensor, columns in ((A, 100), (B, 64)):
        bound = math.sqrt(6 / columns)
        assert 0.98 * bound < float(tensor.abs().max()) <= bound
        assert abs(float(tensor.var()) * columns / 2 - 1) < 0.1
        assert abs(float(tensor.mean())) < 0.05 * bound
    again = random_projections(64, 100, 400, seed=3)
    assert torch.equal(A, again[0])
    assert torch.equal(B, again[1])
    assert not torch.equal(A, random_projections(64, 100, 400, seed=4)[0])


def test_projections_follow_a_device_and_no_dtype() -> None:
    projections = drawn()
    before = projections.A.clone(), projections.B.clone()
    assert projections.to(torch.float64) is projections
    assert [t.dtype for t in projections.buffers()] == [torch.float32] * 2
    assert torch.equal(projections.A, before[0])
    assert torch.equal(projections.B, before[1])
    assert not projections.state_dict()
    projections.to("meta")
    assert [(t.device.type, t.shape) for t in projections.buffers()] == [("meta", b.shape) for b in before]
    projections.to_empty(device="cpu")
    assert [(t.device.type, t.shape) for t in projections.buffers()] == [("cpu", b.shape) for b in before]


def test_layers_that_share_a_x() -> None:
    """The same projections, the same input width; anything else has an A x of its own."""
    shared = drawn()
    first = vera(shared)
    assert of_same_input([first, vera(shared, out=2)])
    assert not of_same_input([first, vera(shared, in_features=6)])
    assert not of_same_input([first, vera(drawn())])
    other = LowRank(torch.zeros(3, 4), torch.zeros(5, 3), scale=1.0)
    assert not of_same_input([first, other])
    assert not of_same_input([other, first])
