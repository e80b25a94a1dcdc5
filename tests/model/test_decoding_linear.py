"""Linear layers that multiply few tokens faster: the same results, never those of a weight that was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import loratune as lt
from loratune.lora import blocks_help
from loratune.model import decoding, prepare_decoding
from loratune.model.decoding_linear import DecodingLinear
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
    assert len(prepare_decoding(model)) == 15
    assert prepare_decoding(model) == []  # which have theirs
    after = model(input_ids=IDS).logits.float()
    assert float((after - before).norm() / before.norm()) < 2e-2
    assert all(isinstance(m, nn.Linear) for m in model.modules() if isinstance(m, DecodingLinear))


@needs_kernels
def test_a_weight_that_changes_is_the_one_that_counts() -> None:
    """An adapter folded into the base in place, and taken out again."""
    model = tiny("llama").bfloat16()
    prepare_decoding(model)
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
    with decoding(model):
        assert any(isinstance(module, DecodingLinear) for module in model.modules())
    assert [type(module) for module in model.modules()] == before
    assert not hasattr(model.lm_head, "blocked")


@needs_kernels
def test_gradients_go_through_the_layers_own_forward() -> None:
    layer = nn.Sequential(nn.Linear(8, 4)).bfloat16().requires_grad_(False)
    assert len(prepare_decoding(layer)) == 1
    x = torch.randn(3, 8).bfloat16().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, layer[0].weight.sum(0).expand(3, 8))


def test_what_trains_or_finds_no_room_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare_decoding(nn.Sequential(nn.Linear(8, 4).bfloat16())) == []
    assert prepare_decoding(nn.Sequential(nn.Linear(8, 4)).requires_grad_(False)) == []  # fp32
    monkeypatch.setattr("loratune.model.decoding_linear.available_memory", lambda _: 4 * 64 - 1)
    assert prepare_decoding(nn.Sequential(nn.Linear(8, 4).bfloat16()).requires_grad_(False)) == []


def in_bits(quant: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    model = tiny("llama").to(dtype).requires_grad_(False)
    lt.quantize(model, quant)
    return model


FORMATS = pytest.mark.parametrize("quant", ["int8", "nf4"])


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_few_bits_give_the_same(quant: str, dtype: torch.dtype) -> None:
    model = in_bits(quant, dtype)
    before = {tokens: model(input_ids=IDS[:, :tokens]).logits.float() for tokens in (1, 2, 20)}
    assert len(prepare_decoding(model)) == (15 if dtype == torch.bfloat16 and blocks_help(model.lm_head.weight) else 14)
    assert all(module.blocked is not None for module in model.modules() if isinstance(module, DecodingLinear))
    for tokens, expected in before.items():
        after = model(input_ids=IDS[:, :tokens]).logits.float()
        assert float((after - expected).norm() / expected.norm()) < (1e-5 if dtype == torch.float32 else 2e-2)


@FORMATS
def test_few_bits_that_change_are_those_that_count(quant: str) -> None:
    model = in_bits(quant)
    prepare_decoding(model)
    lora = lt.attach(model, lt.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    for tokens in (1, 20):
        with torch.no_grad():
            adapted = model(input_ids=IDS[:, :tokens]).logits.float()
            with lora.disabled():
                bare = model(input_ids=IDS[:, :tokens]).logits.float()
            lora.merge()
            merged = model(input_ids=IDS[:, :tokens]).logits.float()
            lora.unmerge()
            assert torch.equal(model(input_ids=IDS[:, :tokens]).logits.float(), adapted)
        assert float((merged - adapted).norm()) < 0.5 * float((bare - adapted).norm())


@torch.no_grad()
def test_codes_are_read_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """In eight bits and bf16; nothing is decoded, and nothing is kept."""
    model = in_bits("int8")
    expected = model(input_ids=IDS[:, :1]).logits.float()
    ready = prepare_decoding(model, copy=False)
    assert ready
    assert all(isinstance(module, DecodingLinear) and module.blocked is None for module in ready)

    def never(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError("decoded")

    monkeypatch.setattr("loratune.quant.formats.Int8.decode", never)
    found = model(input_ids=IDS[:, :1]).logits.float()
    assert float((found - expected).norm() / expected.norm()) < 2e-2
    with pytest.raises(AssertionError, match="decoded"):
        model(input_ids=torch.arange(60)[None])


def test_four_bits_are_left_alone_without_a_copy() -> None:
    assert prepare_decoding(in_bits("nf4"), copy=False) == []
