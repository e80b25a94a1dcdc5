"""Which modules hold a weight that can be adapted, and how a delta is added to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from loratune.quant import frozen_weight
from loratune.quant.weight import DenseWeight
from tests.oracle import lora_reference as oracle

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def test_linear_and_conv1d_are_seen_as_the_same_map() -> None:
    for module in (nn.Linear(3, 5), Conv1D(5, 3)):
        weight = frozen_weight(module)
        assert isinstance(weight, DenseWeight)
        assert weight.parameter is module.weight
        assert (weight.kind, weight.in_features, weight.out_features) == (type(module).__name__, 3, 5)
        delta = torch.randn(5, 3)
        x = torch.randn(2, 3)
        before = module(x)
        module.weight.data = weight.plus(delta)["weight"]
        assert torch.allclose(module(x), before + x @ delta.T, atol=1e-5)


def test_subclasses_keep_their_kind() -> None:
    class Mine(nn.Linear):
        pass

    class Theirs(Conv1D):
        pass

    for module, kind in ((Mine(3, 5), "Linear"), (Theirs(5, 3), "Conv1D")):
        weight = frozen_weight(module)
        assert weight is not None
        assert weight.kind == kind


class Named(nn.Module):
    """Something else that happens to be called like GPT-2's layer."""


Named.__name__ = "Conv1D"


def other_modules() -> list[nn.Module]:
    named = Named()
    named.weight = nn.Parameter(torch.zeros(3, 5))
    buffer = nn.Linear(3, 5)
    del buffer.weight
    buffer.register_buffer("weight", torch.zeros(5, 3))
    integers = nn.Linear(3, 5)
    integers.weight = nn.Parameter(torch.zeros(5, 3, dtype=torch.int8), requires_grad=False)
    packed = nn.Linear(3, 5)
    packed.weight = nn.Parameter(torch.zeros(15))
    return [
        nn.Embedding(3, 5),
        nn.Conv1d(3, 5, 1),
        nn.Conv2d(3, 5, 1),
        nn.LayerNorm(3),
        nn.Bilinear(3, 4, 5),
        nn.Sequential(nn.Linear(3, 5)),
        nn.ReLU(),
        named,
        buffer,
        integers,
        packed,
        parametrizations.weight_norm(nn.Linear(3, 5)),
    ]


@pytest.mark.parametrize("module", other_modules(), ids=lambda module: type(module).__name__)
def test_others_are_refused(module: nn.Module) -> None:
    assert frozen_weight(module) is None


@pytest.mark.parametrize("stored", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("adding", [torch.float32, torch.float64], ids=str)
@settings(derandomize=True, deadline=None, max_examples=20, database=None)
@given(seed=st.integers(0, 2**32), size=st.sampled_from([1e-4, 1e-2, 1.0]), transposed=st.booleans())
def test_a_delta_is_added_wide_and_rounded_once(
    stored: torch.dtype, adding: torch.dtype, seed: int, size: float, transposed: bool
) -> None:
    torch.manual_seed(seed)
    values = torch.randn(4, 6).to(stored)
    delta = torch.randn(4, 6, dtype=adding) * size
    weight = DenseWeight("any", nn.Parameter(values.T.clone() if transposed else values), transposed)
    ours = weight.plus(delta)["weight"]
    assert ours.dtype == stored
    assert not ours.requires_grad
    total = oracle.exact(values) + oracle.exact(delta)
    if adding == torch.float32:
        total = oracle.rounded(total, "float32")
    expected = oracle.rounded(total, NAMES[stored])
    assert np.array_equal(oracle.exact(ours.T if transposed else ours), expected)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_fp64_is_not_rounded_by_way_of_fp32(stored: torch.dtype, sign: float) -> None:
    # Just above and just below a tie between two numbers of the format: fp32 cannot tell either from the tie.
    step = torch.finfo(stored).eps
    ones = nn.Parameter(torch.full((1, 4), sign, dtype=stored))
    crumb = 2.0**-40
    delta = sign * torch.tensor([[step / 2 + crumb, step / 2 - crumb, 1.5 * step + crumb, 1.5 * step - crumb]]).double()
    delta += sign * torch.tensor([[crumb, -crumb, crumb, -crumb]], dtype=torch.float64)
    ours = DenseWeight("any", ones, transposed=False).plus(delta)["weight"]
    assert ours.tolist() == [[sign * (1 + k * step) for k in (1, 0, 2, 1)]]


def test_what_does_not_fit_becomes_infinite_or_stays_nan() -> None:
    weight = DenseWeight("any", nn.Parameter(torch.zeros(1, 4, dtype=torch.float16)), transposed=False)
    delta = torch.tensor([[1e6, -1e300, torch.nan, torch.inf]], dtype=torch.float64)
    ours = weight.plus(delta)["weight"]
    assert ours[0, 0] == torch.inf
    assert ours[0, 1] == -torch.inf
    assert ours[0, 2].isnan()
    assert ours[0, 3] == torch.inf
