"""Figures for shapes whose numbers are known, and formulas against what they count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig

import loratune as lt
from loratune.adapt import TargetPlan
from loratune.adapt.plan import Target
from loratune.data.batch import make_batch
from loratune.estimation import (
    Shape,
    activation_bytes_per_token,
    estimate_memory,
    forward_rate,
    matmul_rate,
    step_flops,
)
from loratune.loss import summed_loss
from loratune.model import use_packed_attention
from tests.models import PAD, rows_of, tiny


def test_shape_of_a_config() -> None:
    smol = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    assert Shape.of(smol) == Shape(30, 576, 1536, 192, 49152)
    assert Shape.of(GPT2Config()) == Shape(12, 768, 3072, 768, 50257)
    assert Shape.of(tiny("gemma3").config) == Shape(2, 32, 64, 16, 400)


def test_activations() -> None:
    shape = Shape(layers=2, hidden=10, intermediate=20, kv=5, vocabulary=100)
    # (6 · 10 + 2 · 5 + 2 · 20) values a layer, times the stock blocks' share, in two bytes.
    assert activation_bytes_per_token(shape, 2, recompute=False) == pytest.approx(110 * 2 * 2.2 * 2, abs=1)
    assert activation_bytes_per_token(shape, 4, recompute=False) == pytest.approx(110 * 4 * 2.2 * 2, abs=1)
    # Recomputing keeps each block's input and one block's inside.
    assert activation_bytes_per_token(shape, 2, recompute=True) == pytest.approx(2 * 10 * 2 + 110 * 2 * 2.2, abs=1)


def plan_of(*shapes: tuple[int, int], r: int, base: int) -> TargetPlan:
    targets = [Target(f"m{i}", "Linear", inner, outer, r, 2.0) for i, (inner, outer) in enumerate(shapes)]
    return TargetPlan(tuple(targets), base)


def test_memory() -> None:
    plan = plan_of((8, 8), (8, 16), r=2, base=1000)
    shape = Shape(1, 8, 16, 8, 50)
    memory = estimate_memory(plan, shape, itemsize=2, tokens=64, scored=10, recompute=False)
    assert memory.base == 2000
    # r (in + out) parameters: fp32 master, gradient and two moments.
    assert memory.adapter == (2 * 16 + 2 * 24) * 16
    assert memory.activations == 64 * activation_bytes_per_token(shape, 2, recompute=False)
    assert memory.logits == 2 * 10 * 50 * 2 + 3 * 256 * 50 * 4
    assert memory.total == memory.base + memory.adapter + memory.activations + memory.logits


def test_adam_state_of_the_textbook_example() -> None:
    """16.8 M trainable parameters instead of 7 B: 0.27 GB of optimizer, gradient and master instead of 112 GB."""
    plan = plan_of(*[(4096, 4096)] * 256, r=8, base=7_000_000_000)
    assert plan.trainable == 16_777_216
    memory = estimate_memory(plan, Shape(32, 4096, 11008, 4096, 32000), itemsize=2, tokens=0, scored=0, recompute=False)
    assert memory.adapter == 16_777_216 * 16
    assert memory.base == 14_000_000_000


def test_flops_formula() -> None:
    plan = plan_of((8, 8), (8, 16), r=2, base=1000)
    shape = Shape(1, 8, 16, 8, 50)
    frozen, adapter = 64 + 128, 2 * 16 + 2 * 24
    assert step_flops(plan, shape, 10, 3, recompute=False) == 10 * (4 * frozen + 6 * adapter) + 4 * 3 * 8 * 50
    assert step_flops(plan, shape, 10, 3, recompute=True) == 10 * (6 * frozen + 6 * adapter) + 4 * 3 * 8 * 50


def test_flops_against_a_counted_step() -> None:
    """torch's own counter over a real step; it also counts attention's products, which are small at this length."""
    model = tiny(num_hidden_layers=4)
    use_packed_attention(model)
    lora = lt.attach(model, lt.LoraConfig(r=8, target_modules="all-linear"))
    rows = rows_of(9, 14, 6, 11)
    batch = make_batch(rows, packed=True, pad_id=PAD)
    with FlopCounterMode(display=False) as counter:
        summed_loss(model, batch).backward()
    tokens, scored = batch.computed_tokens, batch.supervised
    estimated = step_flops(lora.plan(), Shape.of(model.config), tokens, scored, recompute=False)
    assert estimated == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_rate_is_a_plausible_number() -> None:
    assert 1e6 < matmul_rate(torch.device("cpu"), torch.float32, width=64) < 1e16


def test_forward_rate_counts_the_tokens_it_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass is told to take a second; the first one, which warms up, a hundred."""
    from tests.models import tiny

    sent: list[int] = []
    took = iter([100.0, 1.0, 2.0])

    def pretend(model: Any, ids: torch.Tensor) -> float:
        assert not model.training
        sent.append(ids.shape[1])
        return next(took)

    monkeypatch.setattr("loratune.estimation.speed._forward_seconds", pretend)
    model = tiny("llama").train()
    assert forward_rate(model, tokens=64) == 64.0
    assert sent == [64, 64, 64]
    assert model.training
