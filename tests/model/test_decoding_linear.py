"""Linear layers that multiply few tokens faster: the same results, never those of a weight that was."""

from __future__ import annotations

import copy as copy_module
import pickle
from collections.abc import Iterator

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
        prepare_decoding(model)
        again = model(input_ids=IDS).logits.float()
        lora.unmerge()
        model(input_ids=IDS)
        prepare_decoding(model)
        assert torch.equal(model(input_ids=IDS).logits.float(), adapted)
    assert float((again - merged).norm()) < 0.1 * float((bare - adapted).norm())
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
            prepare_decoding(model)
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


# -- weights that are others by now ------------------------------------------------------------------------------------


def dense(bias: bool = False) -> nn.Sequential:
    layer = nn.Sequential(nn.Linear(64, 64, bias=bias)).bfloat16().requires_grad_(False)
    prepare_decoding(layer)
    return layer


X = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


def is_its_own(layer: nn.Sequential) -> None:
    """What it gives is what its weight as it is now gives."""
    with torch.no_grad():
        found = layer(X).float()
    expected = X.float() @ layer[0].weight.float().T
    if layer[0].bias is not None:
        expected = expected + layer[0].bias.float()
    assert float((found - expected).detach().norm() / expected.detach().norm()) < 1e-2


@needs_kernels
def test_a_weight_in_the_place_of_another_is_not_it() -> None:
    """The allocator may give the address again, and every fresh parameter begins at version 0."""
    memory = torch.randn(2, 64, 64).bfloat16().view(torch.int16).numpy()
    layer = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()

    def parameter() -> nn.Parameter:
        return nn.Parameter(torch.from_numpy(memory[0]).view(torch.bfloat16), requires_grad=False)

    layer[0].weight = parameter()
    prepare_decoding(layer)
    before = layer[0].weight.data_ptr(), layer[0].weight._version
    memory[0] = memory[1]
    layer[0].weight = parameter()
    assert (layer[0].weight.data_ptr(), layer[0].weight._version) == before
    is_its_own(layer)


@needs_kernels
@pytest.mark.parametrize("write", ["in place", "load", "cast", "move"])
def test_a_weight_that_was_written_is_the_one_that_counts(write: str) -> None:
    layer = dense(bias=True)
    if write == "in place":
        layer[0].weight.mul_(2)
    elif write == "load":
        layer.load_state_dict({name: t * 2 for name, t in layer.state_dict().items()}, assign=True)
    elif write == "cast":
        layer.float()[0].weight.mul_(2)
        layer.bfloat16()
    else:
        layer[0].weight.set_(torch.randn(64, 64).bfloat16())
    is_its_own(layer)


@needs_kernels
def test_a_bias_that_was_written_is_the_one_that_counts() -> None:
    layer = dense(bias=True)
    layer[0].bias.add_(3)
    is_its_own(layer)


@needs_kernels
@pytest.mark.parametrize("fused", [True, False])
def test_a_base_that_is_trained_later_answers_with_what_it_learned(fused: bool) -> None:
    """A fused optimizer writes without a trace."""
    layer = dense().requires_grad_()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    for _ in range(3):
        layer(X).float().square().sum().backward()
        optimizer.step()
    layer.requires_grad_(False)
    is_its_own(layer)
    assert prepare_decoding(layer) == []  # it had it before, and has it again
    assert layer[0].blocked is not None
    is_its_own(layer)


@needs_kernels
def test_a_write_without_a_trace_is_seen_when_it_is_prepared_again() -> None:
    layer = dense()
    layer[0].weight.data += 1
    prepare_decoding(layer)
    is_its_own(layer)


@needs_kernels
def test_copies_are_made_anew_and_not_beside_the_old() -> None:
    layer = dense()
    first = layer[0].blocked
    prepare_decoding(layer)
    assert layer[0].blocked is first
    layer[0].weight.mul_(2)
    prepare_decoding(layer)
    assert layer[0].blocked is not first
    layer.requires_grad_()
    prepare_decoding(layer)
    assert not isinstance(layer[0], DecodingLinear)


@needs_kernels
@torch.no_grad()
def test_a_module_that_an_adapter_has_its_own_of() -> None:
    model = tiny("llama").bfloat16()
    prepare_decoding(model)
    lora = lt.attach(model, lt.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    own = next(p for p in lora.parameters() if p.shape == model.lm_head.weight.shape)
    own.mul_(-1)
    hidden = torch.randn(1, 2, 32).bfloat16()
    with lora.disabled():
        bare = model.lm_head(hidden)
    assert torch.allclose(model.lm_head(hidden).float(), -bare.float(), atol=1e-2)


@needs_kernels
@pytest.mark.parametrize("quant", [None, "int8"])
@torch.no_grad()
def test_a_copy_of_the_model_is_without(quant: str | None) -> None:
    model = tiny("llama").bfloat16().requires_grad_(False)
    if quant is not None:
        lt.quantize(model, quant)
    prepare_decoding(model)
    for copy in (copy_module.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(isinstance(module, DecodingLinear) for module in copy.modules())
        assert not any(hasattr(module, "blocked") for module in copy.modules())
        assert type(copy.lm_head) is nn.Linear
        expected, found = (m(input_ids=IDS).logits.float() for m in (model, copy))
        assert float((found - expected).norm() / expected.norm()) < 2e-2
    assert isinstance(model.lm_head, DecodingLinear)


@needs_kernels
def test_quantising_and_decoding_again_leave_no_copies() -> None:
    model = tiny("llama").bfloat16().requires_grad_(False)
    prepare_decoding(model)
    lt.quantize(model, "int8")
    assert not any(hasattr(module, "blocked") for module in everything(model))
    prepare_decoding(model)
    lt.dequantize(model)
    assert not any(hasattr(module, "blocked") for module in everything(model))


def everything(model: nn.Module) -> Iterator[nn.Module]:
    """With the layers for which others stand."""
    for module in model.modules():
        yield module
        yield from vars(module).get("instead_of", ())


@needs_kernels
def test_a_compiled_model() -> None:
    layer = dense()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(X).float(), layer(X).float(), atol=5e-2)


@needs_kernels
@FORMATS
def test_weights_made_for_inference_alone(quant: str) -> None:
    with torch.inference_mode():
        model = tiny("llama").bfloat16()
        lt.quantize(model, quant)
        prepare_decoding(model)
        assert model(input_ids=IDS).logits.isfinite().all()


@torch.no_grad()
def test_codes_have_their_bias() -> None:
    layer = nn.Sequential(nn.Linear(64, 32)).bfloat16().requires_grad_(False)
    layer[0].bias.fill_(7)
    model = nn.Sequential(layer, nn.Linear(32, 8).bfloat16().requires_grad_(False))
    lt.quantize(model, "int8")
    before = model[0](X[:1])
    assert prepare_decoding(model, copy=False)
    assert torch.allclose(model[0](X[:1]).float(), before.float(), atol=0.1)
