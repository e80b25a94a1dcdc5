"""A layer in few bits is the linear map of the matrix that it decodes to, in every mode, and keeps nothing of it."""

from __future__ import annotations

import copy
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from loratune.errors import ConfigError
from loratune.quant import FORMATS, QuantizedLinear, QuantizedWeight, Sample, frozen_weight, quantize

CPU = torch.device("cpu")
KINDS = list(FORMATS)


def layer(
    kind: str, *, inner: int = 96, outer: int = 40, bias: bool = True, dtype: torch.dtype = torch.float32
) -> QuantizedLinear:
    torch.manual_seed(0)
    return QuantizedLinear.of(nn.Linear(inner, outer, bias=bias, dtype=dtype), kind, device=CPU)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_backward(kind: str, dtype: torch.dtype, bias: bool) -> None:
    quantized = layer(kind, bias=bias, dtype=dtype)
    weight = frozen_weight(quantized)
    assert weight is not None
    assert (weight.kind, weight.in_features, weight.out_features) == (kind, 96, 40)
    x = torch.randn(2, 5, 96, dtype=dtype, requires_grad=True)
    y = quantized(x)
    assert torch.equal(y, F.linear(x, weight.dense(), quantized.bias))
    gy = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, gy)
    assert torch.allclose(found, gy @ weight.dense(), atol=1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_train_eval_train(kind: str) -> None:
    """bitsandbytes' own layer packs its bytes anew in an evaluation pass on some processors."""
    quantized, x = layer(kind, dtype=torch.bfloat16), torch.randn(3, 96, dtype=torch.bfloat16)
    before, bytes_before = quantized.train()(x), {n: b.clone() for n, b in quantized.named_buffers()}
    with torch.no_grad():
        assert torch.equal(quantized.eval()(x), before)
    assert torch.equal(quantized.train()(x), before)
    assert all(torch.equal(buffer, bytes_before[name]) for name, buffer in quantized.named_buffers())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_decoded_is_kept(kind: str) -> None:
    quantized = layer(kind, inner=512, outer=512, bias=False)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        quantized(torch.randn(4, 512, requires_grad=True))
    assert sum(kept) < 512


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_that_trains(kind: str) -> None:
    quantized = layer(kind)
    assert quantized.bias is not None
    quantized(torch.randn(7, 96)).sum().backward()
    assert quantized.bias.grad is not None
    assert torch.equal(quantized.bias.grad, torch.full((40,), 7.0))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_gradient(kind: str) -> None:
    quantized = layer(kind, inner=8, outer=4).double()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: quantized(t).square(), (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_casts_leave_the_format_alone(kind: str) -> None:
    quantized = layer(kind)
    weight = frozen_weight(quantized)
    assert weight is not None
    before = weight.dense(torch.float32)
    quantized.to(torch.bfloat16).half().double()
    assert torch.equal(weight.dense(torch.float32), before)
    assert quantized.bias is not None
    assert quantized.bias.dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_state(kind: str) -> None:
    quantized, x = layer(kind), torch.randn(3, 96)
    for other in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert torch.equal(other(x), quantized(x))
    another = QuantizedLinear.of(nn.Linear(96, 40), kind, device=CPU)
    another.load_state_dict(quantized.state_dict())
    assert torch.equal(another(x), quantized(x))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    quantized, x = layer(kind), torch.randn(3, 96)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantized(x)
    weight = frozen_weight(quantized)
    assert weight is not None
    assert quantized.bias is not None
    expected = F.linear(x.bfloat16(), weight.dense(torch.bfloat16), quantized.bias.bfloat16())
    assert torch.equal(y, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_delta_folded_in(kind: str) -> None:
    quantized = layer(kind)
    weight = frozen_weight(quantized)
    assert weight is not None
    delta = torch.randn(40, 96) * 0.05
    wanted = weight.dense(torch.float32) + delta
    folded = weight.plus(delta)
    assert folded.keys() == dict(quantized.named_buffers()).keys()
    back = FORMATS[kind].decode(folded, (40, 96), torch.float32)
    assert float((back - wanted).norm() / wanted.norm()) < (0.11 if kind == "nf4" else 0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_weight_is_let_go_of(kind: str) -> None:
    dense = nn.Linear(256, 256, dtype=torch.bfloat16)
    gone = weakref.ref(dense.weight.untyped_storage())
    quantized = QuantizedLinear.of(dense, kind)
    assert gone() is None
    assert sum(buffer.numel() * buffer.itemsize for buffer in quantized.buffers()) < 256 * 256 * 1.1
    kept = quantized.sample.values.untyped_storage().nbytes()
    assert kept <= 2 * 1024


def test_a_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 64)
            self.first, self.second = nn.Linear(64, 64), Conv1D(32, 64)
            self.tied, self.head = nn.Linear(64, 10, bias=False), nn.Linear(32, 7)
            self.tied.weight = self.embedding.weight

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    model = Model()
    conv, sample = model.second.weight.detach().clone(), Sample.of(model.second.weight)
    assert quantize(model, "int8") == 2
    assert isinstance(model.first, QuantizedLinear)
    assert isinstance(model.second, QuantizedLinear)
    assert isinstance(model.head, nn.Linear)
    assert model.tied.weight is model.embedding.weight
    weight = frozen_weight(model.second)
    assert weight is not None
    assert torch.allclose(weight.dense(), conv.T, atol=0.01)
    assert model.second.sample.shape == (64, 32)
    assert torch.equal(model.second.sample.values, sample.values)


@pytest.mark.parametrize(
    ("model", "format", "words"),
    [(nn.Sequential(nn.Linear(4, 4)), "nf3", "did you mean 'nf4'"), (nn.ReLU(), "nf4", "no linear layers")],
)
def test_refused(model: nn.Module, format: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        quantize(model, format)


def test_refused_where_codes_are_not_made() -> None:
    with pytest.raises(ConfigError, match=r"quant='nf4' on 'meta'.*cpu, cuda") as caught:
        quantize(nn.Sequential(nn.Linear(64, 64)), "nf4", device=torch.device("meta"))
    assert "--quant" in caught.value.hint


@pytest.mark.parametrize("kind", list(FORMATS))
def test_decoded_weights_take_turns_in_one_place(kind: str) -> None:
    """Of all that a pass decodes nothing is taken from the heap but one matrix of the largest size."""
    layers = [QuantizedLinear.of(nn.Linear(64, size, bias=False), kind) for size in (96, 32, 128, 64)]
    weights = [QuantizedWeight(layer) for layer in layers]
    exact = [weight.dense(torch.float32) for weight in weights]
    with torch.inference_mode():
        lent = [weight.lent(torch.float32).clone() for weight in weights]
    assert all(torch.equal(a, b) for a, b in zip(lent, exact, strict=True))
    largest = weights[2].lent(torch.float32)
    assert torch.equal(largest, exact[2])
    smaller = weights[1].lent(torch.float32)
    assert smaller.data_ptr() == largest.data_ptr()
    x = torch.randn(3, 64, requires_grad=True)
    sum(layer(x).sum() for layer in layers).backward()
    torch.testing.assert_close(x.grad, sum(weight.sum(0) for weight in exact).expand(3, 64))


def test_threads_have_places_of_their_own() -> None:
    weights = [QuantizedWeight(QuantizedLinear.of(nn.Linear(64, 64, bias=False), "int8")) for _ in range(2)]
    here = weights[0].lent(torch.float32)
    with ThreadPoolExecutor(1) as other:
        there = other.submit(weights[1].lent, torch.float32).result()
    assert here.data_ptr() != there.data_ptr()
    assert torch.equal(here, weights[0].dense(torch.float32))


@pytest.mark.parametrize("kind", list(FORMATS))
def test_the_gradient_has_a_gradient(kind: str) -> None:
    layers = nn.Sequential(*(QuantizedLinear.of(nn.Linear(64, 64, bias=False), kind) for _ in range(2)))
    x = torch.randn(3, 64, requires_grad=True)
    (gx,) = torch.autograd.grad(layers(x).square().sum(), x, create_graph=True)
    gx.square().sum().backward()
    W = QuantizedWeight(layers[1]).dense(torch.float32) @ QuantizedWeight(layers[0]).dense(torch.float32)
    H = 2 * W.T @ W
    torch.testing.assert_close(x.grad, 2 * x.detach() @ H @ H, rtol=1e-4, atol=1e-3)
