"""Adapters on a base in few bits: the equation on the matrix that the bits stand for, through every verb and family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loratune as lt
from loratune.errors import AdapterStateError, TargetError
from loratune.lora import base_modules
from loratune.quant import FORMATS, QuantizedLinear, drop_originals, frozen_weight, quantize, stored_in
from tests.models import rows_of, tiny

CPU = torch.device("cpu")
IDS = torch.tensor([list(row.ids) for row in rows_of(11, 11, 11)])
FAMILIES = ["llama", "qwen3", "gemma3", "phi3", "gpt2", "mixtral"]


def in_bits(family: str = "llama", kind: str = "nf4", **options: Any) -> Any:
    model = tiny(family)
    quantize(model, kind, **options)
    return model


def decoded(family: str, kind: str) -> Any:
    """The same model with dense weights, those that the bits stand for."""
    model, bits = tiny(family), dict(in_bits(family, kind).named_modules())
    for path, module in model.named_modules():
        if isinstance(bits[path], QuantizedLinear):
            weight, own = frozen_weight(bits[path]), frozen_weight(module)
            assert weight is not None
            assert own is not None
            dense = weight.dense()
            module.weight.data = dense.T.contiguous() if type(module).__name__ == "Conv1D" else dense
    return model


def config(**settings: Any) -> lt.LoraConfig:
    return lt.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    )


def stepped(model: Any, lora: Any, steps: int = 2) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(IDS, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in lora.parameters()]


@pytest.mark.parametrize("kind", list(FORMATS))
@pytest.mark.parametrize("family", FAMILIES)
def test_as_on_the_decoded_base(family: str, kind: str) -> None:
    """Logits, gradients and two steps equal those on dense weights of the same values."""
    found, expected = in_bits(family, kind), decoded(family, kind)
    torch.manual_seed(1)
    one = lt.attach(found, config())
    torch.manual_seed(1)
    other = lt.attach(expected, config())
    assert torch.allclose(found(IDS).logits, expected(IDS).logits, atol=1e-5)
    for mine, theirs in zip(stepped(found, one), stepped(expected, other), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"bias": "all"}], ids=str)
def test_variants(settings: dict[str, Any]) -> None:
    found, expected = in_bits("gpt2"), decoded("gpt2", "nf4")
    torch.manual_seed(1)
    one = lt.attach(found, config(**settings))
    torch.manual_seed(1)
    other = lt.attach(expected, config(**settings))
    for mine, theirs in zip(stepped(found, one), stepped(expected, other), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=2e-5)


def test_the_bytes_never_change() -> None:
    model = in_bits()
    before = {name: tensor.clone() for name, tensor in stored_in(base_modules(model))}
    lora = lt.attach(model, config())
    base = model.eval()(IDS).logits
    stepped(model.train(), lora)
    model.eval()(IDS)
    stepped(model.train(), lora)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored_in(base_modules(model)))
    with lora.disabled():
        assert not torch.equal(model.eval()(IDS).logits, base)
    lora.detach()
    assert torch.equal(model(IDS).logits, in_bits()(IDS).logits)


@pytest.mark.parametrize("kind", list(FORMATS))
def test_rows_of_a_batch_have_adapters_of_their_own(kind: str) -> None:
    model = in_bits(kind=kind).eval()
    lora = lt.attach(model, config(), name="a")
    lora.add(config(r=2), "b")
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    alone = []
    for names in (("a",), (), ("b",)):
        lora.activate(*names)
        alone.append(model(IDS[:1]).logits)
    with lora.rows(["a", None, "b"]):
        found = model(IDS[:1].repeat(3, 1)).logits
    # Three rows are multiplied in another order than one, and bits are decoded in blocks.
    for row, expected in zip(found, alone, strict=True):
        apart = [float((row - other[0]).detach().norm() / other.detach().norm()) for other in alone]
        assert min(apart) == float((row - expected[0]).detach().norm() / expected.detach().norm()) < 5e-5
        assert sorted(apart)[1] > 1e-2


def test_counts_are_of_weights_not_of_bytes() -> None:
    dense, bits = lt.attach(tiny("llama"), config()), lt.attach(in_bits(), config())
    assert bits.count() == dense.count()
    assert bits.plan().base_parameters == dense.plan().base_parameters
    assert "nf4" in {target.kind for target in bits.plan().targets}


def test_one_base_whatever_its_format(tmp_path: Path) -> None:
    """An adapter trained on a base in bits is that base's: it loads on the dense one, and on no other."""
    model = in_bits()
    lora = lt.attach(model, config())
    stepped(model, lora)
    lora.save(tmp_path / "adapter")
    lt.attach(tiny("llama"), tmp_path / "adapter")
    again = in_bits()
    lt.attach(again, tmp_path / "adapter")
    assert torch.equal(again.eval()(IDS).logits, model.eval()(IDS).logits)
    stranger = tiny("llama")
    stranger.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    quantize(stranger, "nf4")
    with pytest.raises(lt.errors.AdapterFileError, match="another base"):
        lt.attach(stranger, tmp_path / "adapter")


@pytest.mark.parametrize("kind", list(FORMATS))
def test_merge_and_unmerge(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = in_bits(kind=kind)
    lora = lt.attach(model, config())
    live = model(IDS).logits
    before = {name: tensor.clone() for name, tensor in stored_in(base_modules(model))}
    with caplog.at_level("WARNING", logger="loratune"):
        missed = lora.merge()
    assert missed.keys() == lora.factors().keys()
    for path, low_rank in lora.factors().items():
        weight, plain = frozen_weight(model.get_submodule(path)), frozen_weight(in_bits(kind=kind).get_submodule(path))
        assert weight is not None
        assert plain is not None
        delta = low_rank.delta(plain.dense(torch.float32))
        away = weight.dense(torch.float32) - (plain.dense(torch.float32) + delta)
        assert missed[path] == pytest.approx(float(away.norm() / delta.norm()), rel=1e-4)
    assert f"at worst {max(missed.values()):.0%}" in caplog.text
    merged = model(IDS).logits
    assert float((merged - live).norm() / live.norm()) < (0.5 if kind == "nf4" else 0.05)
    assert not torch.equal(merged, live)
    lora.unmerge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored_in(base_modules(model)))
    assert torch.equal(model(IDS).logits, live)


def test_a_dense_weight_is_merged_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert lt.attach(tiny("llama"), config()).merge() == {}
    assert not caplog.text


def test_the_format_is_changed_only_where_no_adapter_stands() -> None:
    """A layer that gives way would take its adapter with it, in silence."""
    model = tiny("llama")
    lora = lt.attach(model, config())
    before = model(IDS).logits
    for change in (lambda: lt.quantize(model, "nf4"), lambda: lt.dequantize(model)):
        with pytest.raises(AdapterStateError, match="adapters already"):
            change()
    assert torch.equal(model(IDS).logits, before)
    lora.detach()
    layers = lt.quantize(model, "nf4")
    bits = model(IDS).logits
    assert lt.dequantize(model) == layers > 0
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert torch.allclose(model(IDS).logits, bits, atol=1e-5)


def test_an_adapter_of_bits_is_merged_exactly_into_the_decoded_base(tmp_path: Path) -> None:
    model = in_bits()
    lora = lt.attach(model, config())
    live = model(IDS).logits
    lora.save(tmp_path / "adapter")
    lora.detach()
    lt.dequantize(model)
    dense = lt.attach(model, tmp_path / "adapter", any_base=True)
    assert dense.merge() == {}
    assert torch.allclose(model(IDS).logits, live, atol=1e-5)


def test_merge_refuses_what_is_not_finite() -> None:
    model = in_bits()
    lora = lt.attach(model, config())
    low_rank = next(iter(lora.factors().values()))
    low_rank.B.data[0, 0] = torch.nan
    before = {name: tensor.clone() for name, tensor in stored_in(base_modules(model))}
    with pytest.raises(AdapterStateError, match="NaN"):
        lora.merge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored_in(base_modules(model)))
    assert not lora.merged


@pytest.mark.parametrize("kind", list(FORMATS))
def test_loftq_starts_nearer_to_the_dense_base(kind: str) -> None:
    model = in_bits(kind=kind, keep_originals=True)
    dense = dict(tiny("llama").named_modules())
    lora = lt.attach(model, config(init_lora_weights="loftq"))
    for path, low_rank in lora.factors().items():
        weight = frozen_weight(model.get_submodule(path))
        assert weight is not None
        residual = dense[path].weight - weight.dense()
        left = residual - low_rank.scale * low_rank.B @ low_rank.A
        singular = torch.linalg.svdvals(residual)
        assert torch.allclose(left.norm(), singular[4:].norm(), rtol=1e-3)  # Eckart and Young: none is nearer
    drop_originals(model)
    with pytest.raises(TargetError, match="not known"):
        lora.add(config(init_lora_weights="loftq"), "second")


def test_loftq_needs_the_weights_before() -> None:
    for model in (tiny("llama"), in_bits()):
        with pytest.raises(TargetError, match="loftq"):
            lt.attach(model, config(init_lora_weights="loftq"))
        assert not any("Lora" in type(module).__name__ for module in model.modules())


def test_what_is_quantised_cannot_train_whole() -> None:
    with pytest.raises(TargetError, match=r"up_proj.*nf4"):
        lt.attach(in_bits(), config(target_modules=("q_proj",), modules_to_save=("up_proj",)))


def test_nothing_decoded_is_kept_for_the_backward_pass() -> None:
    """Bytes that autograd keeps on a base in bits are those on a dense one."""

    def kept(model: Any) -> int:
        lt.attach(model, config(init_lora_weights=True))
        held: dict[int, int] = {}
        own = {parameter.data_ptr() for parameter in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in own:
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model.train()(IDS, use_cache=False).logits
        del out
        return sum(held.values())

    assert kept(in_bits()) <= kept(tiny("llama"))


# -- bitsandbytes' own modules -----------------------------------------------------------------------------------------

bnb = pytest.importorskip("bitsandbytes")


def foreign(kind: str, inner: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    if kind == "4bit":
        layers = [
            bnb.nn.Linear4bit(inner, 128, quant_type="nf4", compute_dtype=torch.float32),
            bnb.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=torch.float32),
        ]
    else:
        layers = [
            bnb.nn.Linear8bitLt(inner, 48, has_fp16_weights=False),
            bnb.nn.Linear8bitLt(48, 16, has_fp16_weights=False),
        ]
    return nn.Sequential(*layers).to("cpu").requires_grad_(False)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_on_bitsandbytes_own_layers(kind: str) -> None:
    model = foreign(kind)
    x = torch.randn(5, 64)
    if kind == "8bit":
        model(x)  # which moves its state to where it stays
    base = model.train()(x)  # an evaluation pass may pack it anew
    lora = lt.attach(model, config(target_modules=("0", "1")))
    model.train()
    seen = x.clone().requires_grad_()
    y = model(seen)
    y.square().sum().backward()
    low, high = (lora.factors()[name] for name in ("0", "1"))
    W0, W1 = (frozen_weight(layer).dense(torch.float32) for layer in model)  # type: ignore[union-attr]
    X = x.clone().requires_grad_()
    b0, b1 = (layer.bias for layer in model)
    hidden = F.linear(X, W0, b0) + low.scale * X @ low.A.detach().T @ low.B.detach().T
    expected = F.linear(hidden, W1, b1) + high.scale * hidden @ high.A.detach().T @ high.B.detach().T
    expected.square().sum().backward()
    near = 0.05 if kind == "8bit" else 1e-5  # LLM.int8() rounds activations too
    assert float((y - expected).norm() / expected.norm()) < near
    assert float((seen.grad - X.grad).norm() / X.grad.norm()) < near  # type: ignore[operator, union-attr]
    assert all(p.grad is not None and bool(p.grad.any()) for p in lora.parameters())
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(x), y, atol=1e-5 if kind == "4bit" else 0.1)
    assert torch.equal(model.train()(x), y)  # train → eval → train
    with lora.disabled(), torch.no_grad():
        assert torch.allclose(model.eval()(x), base, atol=1e-5 if kind == "4bit" else 0.05)
    with pytest.raises(AdapterStateError, match="merged into"):
        lora.merge()


def test_a_layer_that_bitsandbytes_packed_anew() -> None:
    model = foreign("4bit")
    with torch.no_grad():
        model.eval()(torch.randn(2, 64))
    if not getattr(model[0].weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this processor's layers are not packed anew")
    with pytest.raises(TargetError, match="packed it anew"):
        lt.attach(model, config(target_modules=("0",)))


def test_quantize_is_public() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    assert quantize(model, "int8") == 1
