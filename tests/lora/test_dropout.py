"""Masks as a function of (seed, step, layer, token, feature), and where dropout acts (BEHAVIOUR 13)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import loratune as lt
from loratune.errors import AdapterStateError
from loratune.lora import TokenCounter
from loratune.lora.dropout import drop, keep_mask
from tests.oracle import lora_reference as oracle

SETTINGS = settings(derandomize=True, deadline=None, max_examples=60, database=None)
SEEDS = st.integers(0, 2**63 - 1)
STEPS = st.integers(0, 2**40)
LAYERS = st.integers(0, 2**32 - 1)


def mask(tokens: Tensor, width: int, p: float, *, seed: int = 0, step: int = 0, layer: int = 0) -> Tensor:
    return keep_mask(tokens, width, p, seed=seed, step=step, layer=layer)


@SETTINGS
@given(
    tokens=st.lists(st.integers(0, 2**40), min_size=1, max_size=6),
    width=st.integers(1, 12),
    p=st.floats(0.001, 0.999),
    seed=SEEDS,
    step=STEPS,
    layer=LAYERS,
)
def test_equals_the_integer_reference(
    tokens: list[int], width: int, p: float, seed: int, step: int, layer: int
) -> None:
    ours = mask(torch.tensor(tokens), width, p, seed=seed, step=step, layer=layer)
    expected = [[oracle.keeps(t, f, p, seed=seed, step=step, layer=layer) for f in range(width)] for t in tokens]
    assert ours.tolist() == expected


@SETTINGS
@given(order=st.permutations(range(12)), cut=st.integers(1, 11), width=st.integers(1, 9))
def test_order_and_micro_batches_do_not_matter(order: list[int], cut: int, width: int) -> None:
    whole = mask(torch.arange(12), width, 0.5)
    mixed = torch.tensor(order)
    parts = torch.cat([mask(mixed[:cut], width, 0.5), mask(mixed[cut:], width, 0.5)])
    assert torch.equal(parts, whole[mixed])
    assert torch.equal(mask(mixed.view(3, 4), width, 0.5), whole[mixed].view(3, 4, width))


def test_seed_step_and_layer_each_give_other_masks() -> None:
    tokens = torch.arange(32)
    several = [
        mask(tokens, 32, 0.5, seed=seed, step=step, layer=layer)
        for seed, step, layer in itertools.product(range(3), range(3), range(3))
    ]
    for a, b in itertools.combinations(several, 2):
        # 1 024 fair coins agree half the time, give or take 16.
        assert abs(int((a == b).sum()) - 512) < 5 * 16


@pytest.mark.parametrize("p", [0.01, 0.05, 0.1, 0.5, 0.9])
def test_the_rate_and_the_independence_of_its_bits(p: float) -> None:
    rows, columns, steps = 256, 192, 4
    kept = torch.stack([mask(torch.arange(rows), columns, p, seed=7, step=step) for step in range(steps)])
    values = (kept.double() - (1 - p)) / math.sqrt(p * (1 - p))  # mean 0 and variance 1, if the rate is right
    assert values.mean().abs() < 4 / math.sqrt(values.numel())
    for axis in (
        1,
        2,
    ):  # each feature's rate over the tokens, each token's over the features: as spread as chance has it
        n = values.shape[axis]
        means = values.mean(axis)
        assert means.square().mean() * n == pytest.approx(1, abs=0.25)
        assert means.abs().max() < 5.5 / math.sqrt(n)
    for name, a, b in (
        ("neighbouring tokens", values[:, 1:], values[:, :-1]),
        ("neighbouring features", values[:, :, 1:], values[:, :, :-1]),
        ("neighbouring steps", values[1:], values[:-1]),
        ("diagonals", values[:, 1:, 1:], values[:, :-1, :-1]),
        ("rectangles", values[:, 1:, 1:] * values[:, :-1, :-1], values[:, 1:, :-1] * values[:, :-1, 1:]),
    ):
        product = a * b
        limit = 4.5 * float(product.square().mean().sqrt()) / math.sqrt(product.numel())
        assert product.mean().abs() < max(limit, 4.5 / math.sqrt(product.numel())), name


def test_extreme_rates_drop_and_never_keep_everything() -> None:
    for p in (1 - 2**-33, 1 - 1e-16):
        assert not mask(torch.arange(100), 100, p).any()
    assert mask(torch.arange(100), 100, 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.3])
def test_kept_features_are_scaled_as_torch_scales_them(dtype: torch.dtype, p: float) -> None:
    x = torch.randn(64, 32, dtype=dtype)
    counter = TokenCounter(1, 2, torch.arange(64))
    dropped = drop(x, p, counter, 3)
    kept = mask(counter.tokens, 32, p, seed=1, step=2, layer=3)
    expected = (x.double() / (1 - p)).to(dtype)
    assert dropped.dtype == dtype
    assert not dropped[~kept].any()
    assert torch.allclose(dropped[kept], expected[kept], rtol=1e-6, atol=0)
    assert dtype == torch.float32 or (dropped[kept] == expected[kept]).float().mean() > 0.99, "rounded twice"
    torch.manual_seed(0)
    theirs = F.dropout(x, p)
    both = kept & (theirs != 0)
    assert torch.allclose(dropped[both], theirs[both], rtol=2**-7 if dtype == torch.bfloat16 else 1e-6)


def test_a_flattened_batch_has_the_masks_of_its_tokens() -> None:
    tokens = torch.tensor([[5, 6, 7], [90, 91, 92]])
    x = torch.randn(2, 3, 8)
    expected = x.view(6, 8) * mask(tokens.flatten(), 8, 0.5, layer=1) * 2
    for shape in ((2, 3, 8), (6, 8), (1, 6, 8)):
        assert torch.equal(drop(x.view(shape), 0.5, TokenCounter(0, 0, tokens), 1).view(6, 8), expected)


def test_tokens_that_nobody_counted_are_refused() -> None:
    """An expert sees some of the tokens, and nobody says which: its masks would depend on the micro-batch."""
    counter = TokenCounter(0, 0, torch.arange(12).view(2, 6))
    with pytest.raises(AdapterStateError, match=r"sees 5 of 12 tokens") as caught:
        drop(torch.ones(5, 64), 0.5, counter, 1)
    assert "lora_dropout=0" in caught.value.hint


# -- in a layer ------------------------------------------------------------------------------------------------------


def adapted(p: float) -> tuple[nn.Module, lt.Adapters]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    config = lt.LoraConfig(target_modules=("0",), lora_dropout=p, init_lora_weights=False)
    return model, lt.attach(model, config)


def test_evaluation_is_deterministic_and_drops_nothing() -> None:
    model, handle = adapted(0.5)
    x = torch.randn(4, 16)
    model.eval()
    with handle.counting(TokenCounter(0, 0, torch.arange(4))):
        first = model(x)
    low_rank = handle.factors()["0"]
    assert torch.equal(first, model(x))
    assert torch.allclose(
        first, F.linear(x, model[0].weight + low_rank.delta(model[0].weight), model[0].bias), atol=1e-5
    )


@pytest.mark.parametrize("counted", [True, False])
def test_it_acts_on_the_low_rank_path_only(counted: bool) -> None:
    model, handle = adapted(0.5)
    x = torch.randn(64, 16)
    model.train()
    with handle.disabled():
        base = model(x)
    assert torch.equal(base, F.linear(x, model[0].weight, model[0].bias))
    torch.manual_seed(1)
    if counted:
        with handle.counting(TokenCounter(0, 0, torch.arange(64))):
            y = model(x)
            assert torch.equal(y, model(x)), "a recomputation sees the same mask"
    else:
        y = model(x)
        assert not torch.equal(y, model(x)), "torch's own generator goes on"
    assert not torch.allclose(y, model.eval()(x))
    # What the adapter adds must be B A of an input whose features are zero or doubled: solve for that input.
    low_rank = handle.factors()["0"]
    wide = torch.linalg.lstsq(low_rank.delta(model[0].weight.double()), (y - base).detach().double().T).solution.T
    assert torch.allclose(wide @ low_rank.delta(model[0].weight.double()).T, (y - base).detach().double(), atol=1e-5)


def test_counting_ends_with_its_block() -> None:
    model, handle = adapted(0.5)
    model.train()
    x = torch.randn(8, 16)
    outer = TokenCounter(0, 0, torch.arange(8))
    with handle.counting(outer):
        expected = model(x)
        with handle.counting(TokenCounter(0, 1, torch.arange(8))):
            assert not torch.equal(model(x), expected)
        with pytest.raises(KeyError), handle.counting(TokenCounter(0, 2, torch.arange(8))):
            raise KeyError
        assert torch.equal(model(x), expected)


def test_layers_differ_by_their_path() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(32, 4), "b": nn.Linear(32, 4)})
    handle = lt.attach(model, lt.LoraConfig(target_modules=("a", "b"), lora_dropout=0.5, init_lora_weights=False))
    model["b"].load_state_dict(model["a"].state_dict())
    x = torch.randn(8, 32)
    with handle.counting(TokenCounter(0, 0, torch.arange(8))):
        assert torch.equal(model["a"].eval()(x), model["b"].eval()(x))
        assert not torch.equal(model["a"].train()(x), model["b"].train()(x))
