"""Linear layers with a second copy of their weight: the same results, never those of a weight that was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import loratune as lt
from loratune.lora import blocks_help
from loratune.model import block_linears, blocked_linears
from loratune.model.blocked_linear import BlockedLinear
from tests.models import tiny

needs_kernels = pytest.mark.skipif(
    not blocks_help(torch.ones(1, 1, dtype=torch.bfloat16)), reason="this processor has no such kernels"
)
IDS = torch.arange(3, 30)[None]


@needs_kernels
@torch.no_grad()
def test_a_model_gives_the_same() -> None:
    model = tiny("llama").bfloat16()
    before = model(input_ids=IDS).logits.float()
    assert len(block_linears(model)) == 15
    assert block_linears(model) == []  # which have theirs
    after = model(input_ids=IDS).logits.float()
    assert float((after - before).norm() / before.norm()) < 2e-2
    assert all(isinstance(m, nn.Linear) for m in model.modules() if isinstance(m, BlockedLinear))


@needs_kernels
def test_a_weight_that_changes_is_the_one_that_counts() -> None:
    """An adapter folded into the base in place, and taken out again."""
    model = tiny("llama").bfloat16()
    block_linears(model)
    lora = lt.attach(model, lt.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():
        adapted = model(input_ids=IDS).logits.float()
        with lora.disabled():
            bare = model(input_ids=IDS).logits.float()
        lora.merge()
        merged = model(input_ids=IDS).logits.float()
        lora.unmerge()
        assert torch.equal(model(input_ids=IDS).logits.float(), adapted)
    assert float((merged - adapted).norm()) < 0.2 * float((bare - adapted).norm())


@needs_kernels
def test_for_a_while() -> None:
    model = tiny("llama").bfloat16()
    before = [type(module) for module in model.modules()]
    with blocked_linears(model):
        assert any(isinstance(module, BlockedLinear) for module in model.modules())
    assert [type(module) for module in model.modules()] == before
    assert not hasattr(model.lm_head, "blocked")


@needs_kernels
def test_gradients_go_through_the_layers_own_forward() -> None:
    layer = nn.Sequential(nn.Linear(8, 4)).bfloat16().requires_grad_(False)
    assert len(block_linears(layer)) == 1
    x = torch.randn(3, 8).bfloat16().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, layer[0].weight.sum(0).expand(3, 8))


def test_what_trains_or_finds_no_room_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert block_linears(nn.Sequential(nn.Linear(8, 4).bfloat16())) == []
    assert block_linears(nn.Sequential(nn.Linear(8, 4)).requires_grad_(False)) == []  # fp32
    monkeypatch.setattr("loratune.model.blocked_linear.available_memory", lambda _: 4 * 64 - 1)
    assert block_linears(nn.Sequential(nn.Linear(8, 4).bfloat16()).requires_grad_(False)) == []
