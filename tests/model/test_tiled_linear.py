"""Frozen linear layers by tiles: what they give, whose gradients they have, and where they go their own way."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import loratune as lt
from loratune.kernels import c_blocks, product_over_rows
from loratune.lora import Blocked, together
from loratune.model import fuse, prepare_decoding, unfuse, use_packed_attention
from loratune.model.tiled_linear import TiledLinear, fuse_linear
from loratune.quant import quantize
from tests.models import tiny

pytestmark = pytest.mark.skipif(not c_blocks.TILES, reason="the processor has no matrix unit")


def layer(*, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(70, 50, bias=bias).bfloat16().requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
def test_what_it_gives_and_its_gradient(bias: bool) -> None:
    linear, x = layer(bias=bias), torch.randn(2, 30, 70).bfloat16().requires_grad_()
    stock = F.linear(x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double())
    assert fuse_linear(linear)
    assert isinstance(linear, TiledLinear)
    y, gy = linear(x), torch.randn(2, 30, 50).bfloat16()
    assert "TiledLinear" in str(y.grad_fn)
    assert float((y.double() - stock).abs().max()) <= float(stock.abs().max()) * 2**-8
    (mine,), (right,) = (torch.autograd.grad(out, x, g) for out, g in ((y, gy), (stock, gy.double())))
    assert float((mine.double() - right.double()).abs().max()) <= float(right.abs().max()) * 2**-7
    with torch.no_grad():
        assert torch.equal(linear(x), y)


def test_the_gradients_gradient() -> None:
    linear, x = layer(), torch.randn(40, 70).bfloat16().requires_grad_()
    stock = copy.deepcopy(linear)
    fuse_linear(linear)

    def twice(module: Any) -> Tensor:
        (first,) = torch.autograd.grad(module(x).float().square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.float().square().sum(), x)
        return second.double()

    right = twice(stock)
    assert float((twice(linear) - right).norm() / right.norm()) < 2e-2


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_who_writes_down_what_is_done_sees_it() -> None:
    linear, x = layer(), torch.randn(40, 70).bfloat16()
    fuse_linear(linear)
    expected = linear(x)
    with Counting() as counting, torch.no_grad():
        linear(x)
    assert counting.products == 1
    for written in (torch.jit.trace(linear, (x,), check_trace=False), make_fx(linear)(x)):
        torch.testing.assert_close(written(x), expected)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    torch.testing.assert_close(found, F.linear(torch.ones_like(x), linear.weight))


def test_its_own_way() -> None:
    """Where something of it is trained, is another dtype, or has few rows."""
    linear = layer()
    fuse_linear(linear)
    few = torch.randn(3, 70).bfloat16()
    assert torch.equal(linear(few), nn.Linear.forward(linear, few))
    many = torch.randn(40, 70).bfloat16()
    for parameter in (linear.weight, linear.bias):
        parameter.requires_grad_(True)
        linear(many).sum().backward()
        assert parameter.grad is not None
        parameter.requires_grad_(False)
    assert not fuse_linear(nn.Linear(70, 50).requires_grad_(False))
    assert not fuse_linear(layer().requires_grad_(True))


def fused_llama() -> Any:
    torch.manual_seed(0)
    model = tiny("llama").bfloat16().requires_grad_(False)
    use_packed_attention(model)
    assert fuse(model)
    return model


def test_a_model_is_fused_with_them() -> None:
    model = fused_llama()
    tiled = {name for name, module in model.named_modules() if isinstance(module, TiledLinear)}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert tiled == linears
    unfuse(model)
    assert not any(isinstance(module, TiledLinear) for module in model.modules())


def test_an_adapter_that_has_learned_nothing_changes_no_bit() -> None:
    model = fused_llama()
    ids = torch.arange(60)[None] % 40
    with torch.no_grad():
        base = model(ids).logits
        handle = lt.attach(model, lt.LoraConfig(r=4, target_modules="all-linear"))
        assert torch.equal(model(ids).logits, base)
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.endswith(".B"):
                parameter.normal_()
        with handle.disabled():
            assert torch.equal(model(ids).logits, base)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(together([self.gate, self.up], x), -1)


@pytest.mark.parametrize("quant", [None, "int8", "nf4"])
def test_gradients_through_several_weights(quant: Any) -> None:
    """Those in few bits are decoded one after the other in the same room."""
    torch.manual_seed(0)
    net = Both().bfloat16().requires_grad_(False)
    if quant:
        quantize(net, quant)
    handle = lt.attach(net, lt.LoraConfig(r=4, target_modules=["gate", "up"]))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.1)
    x, gy = torch.randn(80, 64).bfloat16().requires_grad_(), torch.randn(80, 192).bfloat16()
    inputs = [x, *handle.parameters()]
    mine = torch.autograd.grad(net(x), inputs, gy)
    exact, parts = x.detach().double().requires_grad_(), []
    for module in (net.gate, net.up):
        low_rank: Any = module.lora["default"]
        A, B = (t.double() for t in low_rank.factors())
        parts.append(exact @ module.lora_weight(module).dense().double().T + low_rank.scale * (exact @ A.T) @ B.T)
    (right,) = torch.autograd.grad(torch.cat(parts, -1), exact, gy.double())
    assert float((mine[0].double() - right).norm() / right.norm()) < 6e-3


def test_gradients_of_factors_are_not_rounded() -> None:
    """They come in the dtype of what trains."""
    u, v = torch.randn(40, 8).bfloat16(), torch.randn(40, 6).bfloat16()
    found = product_over_rows(u, v)
    assert not torch.equal(found, found.bfloat16().float())


def test_what_is_prepared_for_answers_goes_by_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for many tokens at once, with an adapter and without."""
    model = fused_llama()
    handle = lt.attach(model, lt.LoraConfig(r=4, target_modules="all-linear"))
    prepare_decoding(model)
    used: list[int] = []
    times = Blocked.times
    monkeypatch.setattr(Blocked, "times", lambda self, *told: used.append(1) or times(self, *told))
    linears = sum(isinstance(module, TiledLinear) for module in model.modules())
    with torch.no_grad():
        for context in (nullcontext, handle.disabled):
            used.clear()
            with context():
                model(torch.arange(60)[None] % 40)
            assert len(used) >= linears


def test_a_layer_of_which_an_adapter_has_its_own() -> None:
    """Whole modules that train go their own way, and the base's again without them."""
    model = fused_llama()
    ids = torch.arange(60)[None] % 40
    with torch.no_grad():
        base = model(ids).logits
    names = {"target_modules": ["q_proj"], "modules_to_save": ["o_proj"]}
    handle = lt.attach(model, lt.LoraConfig(r=4, **names))
    model(ids).logits.float().sum().backward()
    own = [p for name, p in model.named_parameters() if "o_proj" in name and p.requires_grad]
    assert own
    assert all(p.grad is not None for p in own)
    with torch.no_grad(), handle.disabled():
        assert torch.equal(model(ids).logits, base)
