"""Figures for shapes whose numbers are known, and formulas against what they count."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3MoeConfig

import loratune as lt
from loratune.adapt import TargetPlan
from loratune.adapt import plan as plan_targets
from loratune.adapt.target import Target
from loratune.config import NO_TARGETS
from loratune.data.batch import make_batch
from loratune.estimation import (
    BaseMemory,
    Pass,
    Shape,
    bytes_per_token,
    estimate_memory,
    forward_rate,
    matmul_rate,
    step_flops,
)
from loratune.kernels import kernels_of
from loratune.lora import base_modules
from loratune.loss import summed_loss
from loratune.model import ends_early, fuse, recompute_activations, use_packed_attention
from loratune.quant import FORMATS, quantize, stored_in
from loratune.training.sharding import units_of
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
    # Two norms a layer and one at the end, shared out among the layers.
    assert shape_of(smol) == Shape(30, 576, 1536, 576, 192, 9, 61 * 576 // 30, 49152, 30 * 3_538_944)
    assert shape_of(GPT2Config()) == Shape(12, 768, 3072, 768, 768, 12, 25 * 768 // 12, 50257, 12 * 7_077_888)
    # Four norms of the layer, one of the query's heads and one of the key's.
    assert Shape.of(tiny("gemma3")) == Shape(2, 32, 64, 32, 16, 4, 4 * 32 + 32 + 16 + 32 // 2, 400, 2 * 9216)


def test_a_token_meets_its_own_experts_only() -> None:
    # Two layers: attention 32 (32 + 16 + 16 + 32), three matrices 32 · 64 of two experts of four; no router, which is
    # small and in some families no linear layer.
    mixtral = Shape.of(tiny("mixtral"))
    assert mixtral.intermediate == 2 * 64
    assert mixtral.linears == 2 * (32 * (32 + 16 + 16 + 32) + 2 * 3 * 32 * 64)
    # Experts narrower than the layers without any, and one that all tokens go through.
    narrow = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3, "mlp_only_layers": [0]}
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 400}
    qwen3 = shape_of(Qwen3MoeConfig(**config, num_attention_heads=4, num_key_value_heads=2, head_dim=8, **narrow))
    assert qwen3.intermediate == 3 * 24
    attention = 32 * (32 + 16 + 16 + 32)
    assert qwen3.linears == 2 * attention + 3 * 32 * 64 + 3 * 3 * 32 * 24


def test_experts_that_are_modules_of_their_own_count_as_stacked_ones_do() -> None:
    stacked, apart = tiny("mixtral"), tiny("mixtral")
    for layer in apart.model.layers:
        matrices = [nn.ModuleList([nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)]) for _ in range(4)]
        layer.mlp.experts = nn.ModuleList(matrices)
    assert Shape.of(apart).linears == Shape.of(stacked).linears


STACKS: dict[str, Any] = {"r": 32, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@pytest.mark.parametrize("adapted", [{"r": 8, "target_modules": ["q_proj", "v_proj"]}, STACKS])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_flops_of_experts_against_a_counted_step(family: str, adapted: dict[str, Any]) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 32}
    narrow = {"moe_intermediate_size": 192, "num_experts": 4, "num_experts_per_tok": 2}
    model = tiny(family, **wide, **(narrow if family == "qwen3_moe" else {}))
    model.set_experts_implementation("eager")
    use_packed_attention(model)
    lora = lt.attach(model, lt.LoraConfig(**adapted))
    batch = make_batch(rows_of(9, 14, 6, 11), packed=True, pad_id=PAD)
    kernels_of(torch.device("cpu"))  # whose trial is no step's
    with FlopCounterMode(display=False) as counter:
        summed_loss(model, batch).backward()
    estimated = step_flops(lora.plan(), Shape.of(model), batch.computed_tokens, batch.supervised, recompute=False)
    assert estimated == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_of_a_stack_a_token_meets_some_experts() -> None:
    """Two of the four, whose rank-r vectors are what is kept of it."""
    model = tiny("mixtral")
    found = plan_targets(model, lt.LoraConfig(**{**STACKS, "r": 4}))
    none = replace(found, targets=())
    kept, _ = bytes_per_token(Shape.of(model), found, 2, recompute=False, fused=True)
    before, _ = bytes_per_token(Shape.of(model), none, 2, recompute=False, fused=True)
    assert kept - before == 2 * 2 * 2 * 4 * 2, "layers, parameters, experts, ranks, bytes"


def shape_of(config: Any) -> Shape:
    with torch.device("meta"):
        return Shape.of(AutoModelForCausalLM.from_config(config))


SHAPE = Shape(layers=2, hidden=10, intermediate=20, query=12, kv=5, heads=3, normed=20, vocabulary=100)


def test_bytes_of_a_token() -> None:
    plan = plan_of((8, 8), (8, 16), r=2, base=1000)
    # Queries and what they give, keys and values; what norms give; both halves.
    layer = (2 * 12 + 2 * 5) * 2 + 20 * 2 + 2 * 20 * 2
    ranks = 4 * 2
    beside = (4 * 20 + 2 * 10) * 2
    assert bytes_per_token(SHAPE, plan, 2, recompute=False, fused=True) == (2 * layer + ranks, beside)
    # Recomputing keeps each layer's input, and one layer's inside beside it.
    assert bytes_per_token(SHAPE, plan, 2, recompute=True, fused=True) == (2 * 10 * 2, layer + ranks // 2 + beside)
    stock = layer + 20 * 4 + 2 * 20 * 2
    assert bytes_per_token(SHAPE, plan, 2, recompute=False, fused=False) == (2 * stock + ranks, beside)


def plan_of(*shapes: tuple[int, int], r: int, base: int) -> TargetPlan:
    targets = [Target(f"m{i}", "Linear", inner, outer, r, 2.0) for i, (inner, outer) in enumerate(shapes)]
    return TargetPlan(tuple(targets), base)


BASE = BaseMemory(2000)


def test_memory() -> None:
    plan = plan_of((8, 8), (8, 16), r=2, base=1000)
    memory = estimate_memory(plan, SHAPE, Pass(2, tokens=64, scored=10, longest=4), BASE)
    kept, beside = bytes_per_token(SHAPE, plan, 2, recompute=False, fused=True)
    assert memory.base == 2000
    # r (in + out) parameters: fp32 master, gradient and two moments.
    assert memory.adapter == (2 * 16 + 2 * 24) * 16
    rounded = (2 * 16 + 2 * 24) * 2
    assert memory.activations == 64 * kept + rounded
    again = estimate_memory(plan, SHAPE, Pass(2, tokens=64, scored=10, longest=4, recompute=True), BASE)
    kept, _ = bytes_per_token(SHAPE, plan, 2, recompute=True, fused=True)
    assert again.activations == 64 * kept + rounded // 2
    assert memory.working == 64 * beside
    assert memory.total == memory.base + memory.adapter + memory.activations + memory.working
    # With long rows the products of queries and keys outweigh it: three heads' probabilities and their gradient.
    long = estimate_memory(plan, SHAPE, Pass(2, tokens=64, scored=10, longest=64), BASE)
    assert long.working == (2 * 64 * 64 * 3 + 64 * (3 * 12 + 4 * 5)) * 2
    # At most so many at once, and none where a kernel keeps them to itself.
    many = estimate_memory(plan, SHAPE, Pass(2, tokens=1 << 16, scored=10, longest=1 << 16), BASE)
    assert many.working == (2 * (1 << 19) * 3 + (1 << 16) * (3 * 12 + 4 * 5)) * 2
    # With a large vocabulary the logits of a chunk outweigh a layer's gradients.
    wide = replace(SHAPE, vocabulary=100_000)
    logits = (2 * 300 * 2 + 32 * 4) * 100_000 + 2 * 600 * 10 * 2
    assert estimate_memory(plan, wide, Pass(2, tokens=64, scored=600, longest=8), BASE).working == logits


def test_adam_state_of_the_textbook_example() -> None:
    """16.8 M trainable parameters instead of 7 B: 0.27 GB of optimizer, gradient and master instead of 112 GB."""
    plan = plan_of(*[(4096, 4096)] * 256, r=8, base=7_000_000_000)
    assert plan.trainable == 16_777_216
    memory = estimate_memory(plan, SHAPE, Pass(2, tokens=0, scored=0, longest=0), BASE)
    assert memory.adapter == 16_777_216 * 16


WIDTHS: dict[str, Any] = {
    "vocab_size": 4000,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize("how", ["fused", "stock", "recomputed", "nf4", "int8", "everything"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
def test_planned_peak_against_the_allocators(family: str, how: str) -> None:
    """What the allocator itself says a step holds at most, beyond the base, the adapter and its gradients."""
    model = tiny(family, **WIDTHS).to(torch.bfloat16)
    quant = how if how in FORMATS else None
    planned = BaseMemory.of(model, 2, quant)
    if quant is not None:
        quantize(model, quant)
        held_by_base = sum(tensor.numel() * tensor.itemsize for _, tensor in stored_in(base_modules(model)))
        assert planned.weights + planned.constants == held_by_base
        assert BaseMemory.of(model, 2, quant) == planned
    use_packed_attention(model)
    config = EVERYTHING if how == "everything" else {"r": 8, "target_modules": "all-linear"}
    lora = lt.attach(model, lt.LoraConfig(**config))
    if how != "stock":
        assert fuse(model)
    if how == "recomputed":
        recompute_activations(model.train())
    batch = make_batch(rows_of(*[128] * 8), packed=True, pad_id=PAD)

    def step() -> None:
        summed_loss(model, batch).backward()

    step()  # gradients stand from here on
    held = most_held(step)
    through = Pass(2, batch.computed_tokens, batch.supervised, 128, how == "recomputed", how != "stock")
    through = replace(through, ends_early=ends_early(model))
    memory = estimate_memory(lora.plan(), Shape.of(model), through, planned)
    assert memory.activations + memory.working == pytest.approx(held, rel=0.15)


def test_planned_peak_of_a_last_layer_that_ends_early() -> None:
    """Few tokens are scored, so that the last of two layers keeps little beside its keys and values."""
    model = tiny("llama", **WIDTHS).to(torch.bfloat16)
    use_packed_attention(model)
    lora = lt.attach(model, lt.LoraConfig(r=8, target_modules="all-linear"))
    assert fuse(model)
    assert ends_early(model)
    rows = [replace(row, supervised=(False,) * 120 + (True,) * 8) for row in rows_of(*[128] * 8)]
    batch = make_batch(rows, packed=True, pad_id=PAD)

    def step() -> None:
        summed_loss(model, batch).backward()

    step()
    held = most_held(step)
    through = Pass(2, batch.computed_tokens, batch.supervised, 128)
    found, without = (
        estimate_memory(lora.plan(), Shape.of(model), replace(through, ends_early=early), BaseMemory(0))
        for early in (True, False)
    )
    assert found.activations + found.working == pytest.approx(held, rel=0.15)
    assert without.activations + without.working > 1.2 * held
    again = replace(through, ends_early=True, recompute=True)
    assert estimate_memory(lora.plan(), Shape.of(model), again, BASE) == estimate_memory(
        lora.plan(), Shape.of(model), replace(again, ends_early=False), BASE
    )


def most_held(step: Callable[[], object]) -> int:
    """The most bytes of tensors that `step` holds beyond what stood before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held)


def test_flops_formula() -> None:
    plan = plan_of((8, 8), (8, 16), r=2, base=1000)
    shape = replace(SHAPE, hidden=8, vocabulary=50, linears=64 + 128)
    frozen, adapter = 64 + 128, 2 * 16 + 2 * 24
    assert step_flops(plan, shape, 10, 3, recompute=False) == 10 * (4 * frozen + 6 * adapter) + 4 * 3 * 8 * 50
    assert step_flops(plan, shape, 10, 3, recompute=True) == 10 * (6 * frozen + 6 * adapter) + 4 * 3 * 8 * 50


EVERYTHING = {"target_modules": NO_TARGETS, "modules_to_save": ["model", "lm_head"], "ensure_weight_tying": True}


@pytest.mark.parametrize(
    "settings",
    [{"r": 8, "target_modules": "all-linear"}, {"r": 8, "target_modules": ["q_proj"]}, EVERYTHING],
    ids=["all linears", "few", "everything"],
)
@pytest.mark.parametrize("tied", [True, False])
def test_flops_against_a_counted_step(settings: dict[str, Any], tied: bool) -> None:
    """torch's own counter over a real step; it also counts attention's products, which are small at this length."""
    wide = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 32}
    model = tiny(num_hidden_layers=2, tie_word_embeddings=tied, **wide)
    use_packed_attention(model)
    lora = lt.attach(model, lt.LoraConfig(**settings))
    rows = rows_of(9, 14, 6, 11)
    batch = make_batch(rows, packed=True, pad_id=PAD)
    kernels_of(torch.device("cpu"))  # whose trial is no step's
    with FlopCounterMode(display=False) as counter:
        summed_loss(model, batch).backward()
    tokens, scored = batch.computed_tokens, batch.supervised
    estimated = step_flops(lora.plan(), Shape.of(model), tokens, scored, recompute=False)
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


def test_parts_of_a_base() -> None:
    """Two processes hold half each; what no layer holds is whole besides, with two layers and what trains in them."""
    model = tiny()
    units, targets = units_of(model), plan_targets(model, lt.LoraConfig(r=4, target_modules="all-linear"))
    held = BaseMemory.of(model, 2, None, in_layers=units)
    layers = sum(p.numel() for p in model.model.layers.parameters()) * 2
    assert (len(units), held.in_layers) == (2, layers)
    through = Pass(2, tokens=64, scored=10, longest=8)
    one, two = (estimate_memory(targets, Shape.of(model), through, held, parts=parts) for parts in (1, 2))
    assert (one.gathered, two.gathered) == (0, held.weights - layers + layers + 4 * targets.trainable)
    for name in ("base", "masters", "gradients", "optimizer"):
        assert getattr(two, name) == -(-getattr(one, name) // 2)
    assert (two.activations, two.working) == (one.activations, one.working)
    assert two.total == two.base + two.adapter + two.activations + two.working + two.gathered
