"""The LoRA linear as one autograd step: the same as autograd's own way through the formula, with less kept."""

from __future__ import annotations

import copy
import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import loratune as lt
from loratune.errors import AdapterStateError
from loratune.lora import TokenCounter, together
from loratune.lora.dropout import drop
from loratune.lora.linear import Frozen, of_input
from tests.training.loops import assert_close


class Net(nn.Module):
    def __init__(self, kind: str, bias: bool = True) -> None:
        super().__init__()
        self.q: Any = Conv1D(7, 5) if kind == "Conv1D" else nn.Linear(5, 7, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.q(x)
        return y


def adapted(kind: str = "Linear", dtype: torch.dtype = torch.float64, **config: Any) -> tuple[Net, lt.Adapters]:
    torch.manual_seed(0)
    net = Net(kind).to(dtype)
    handle = lt.attach(net, lt.LoraConfig(r=2, lora_alpha=3, target_modules=["q"], **config), dtype=dtype)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return net, handle


def plain(net: Net, x: Tensor, seen: Tensor) -> Tensor:
    """W x + b + s · B A seen, an operation at a time."""
    layer, low_rank = net.q, net.q.lora["default"]
    weight = layer._parameters["weight"].detach()
    A, B = low_rank.factors()
    y = F.linear(x, weight.T if isinstance(layer, Conv1D) else weight, layer.bias)
    y = y + low_rank.scale * F.linear(F.linear(seen, A), B)
    return y if low_rank.bias is None else y + low_rank.scale * low_rank.bias


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Linear", {}),
    "stored transposed": ("Conv1D", {}),
    "a trained bias": ("Linear", {"bias": "all"}),
    "a bias behind B": ("Linear", {"lora_bias": True}),
    "counted from its start": ("Linear", {"init_lora_weights": "pissa"}),
    "rank-stabilised": ("Linear", {"use_rslora": True}),
}


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_output_and_every_gradient(case: str, dropped: bool) -> None:
    kind, config = CASES[case]
    net, handle = adapted(kind, lora_dropout=0.5 if dropped else 0.0, **config)
    net.train()
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    counter = TokenCounter(0, 3, torch.arange(8).view(2, 4))
    seen = drop(x, 0.5, counter, net.q.lora_index) if dropped else x
    inputs = [x, *handle.parameters()]
    with handle.counting(counter):
        found = net(x)
    expected = plain(net, x, seen)
    torch.testing.assert_close(found, expected)
    assert "LoraLinear" in str(found.grad_fn) or config.get("lora_bias")
    grad = torch.randn_like(expected)
    with handle.counting(counter):
        differentiable = torch.autograd.grad(found, inputs, grad, create_graph=True)
        mine = torch.autograd.grad(found, inputs, grad)
    theirs = list(torch.autograd.grad(expected, inputs, grad))
    assert_close(list(mine), theirs, rel=1e-12)
    # Made by other operations, which `gradgradcheck` compares with themselves alone.
    assert_close([gradient.detach() for gradient in differentiable], theirs, rel=1e-12)


def test_the_gradients_gradient() -> None:
    net, handle = adapted()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    inputs = (x, *handle.parameters())
    assert torch.autograd.gradgradcheck(lambda *_: net(x), inputs)


def test_keeps_its_input_and_the_rank_r_product() -> None:
    net, _ = adapted(dtype=torch.float32)
    x = torch.randn(100, 5, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        net(x)
    own = [t for t in kept if t.data_ptr() != x.data_ptr() and not isinstance(t, nn.Parameter)]
    assert [tuple(t.shape) for t in own] == [(100, 2)]
    assert any(t.data_ptr() == x.data_ptr() for t in kept)


def test_no_gradient_is_computed_that_nobody_wants() -> None:
    net, handle = adapted()
    handle.freeze("default")
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    net(x).sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in handle.parameters())
    with torch.no_grad():
        assert net(x).grad_fn is None


def test_a_weight_that_changes_before_the_backward_pass_is_an_error() -> None:
    net, _ = adapted()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    y = net(x).sum()
    with torch.no_grad():
        net.q._parameters["weight"].add_(1)
    with pytest.raises(AdapterStateError, match="changed between"):
        y.backward()


class Doubling(nn.Linear):
    """A linear layer whose forward is not W x + b."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_forward_of_its_own_keeps_its_gradient() -> None:
    net = Net("Linear")
    net.q = Doubling(5, 7)
    handle = lt.attach(net, lt.LoraConfig(r=2, target_modules=["q"]))
    alone = copy.deepcopy(net.q)
    x = torch.randn(3, 5, requires_grad=True)
    (found,) = torch.autograd.grad(net(x).sum(), x)
    with handle.disabled():
        (expected,) = torch.autograd.grad(net(x).sum(), x)
    assert alone is not net.q
    torch.testing.assert_close(found, expected)  # B is zero, so that the update has no part in it


def test_autocast_and_several_adapters_take_the_plain_way() -> None:
    net, handle = adapted(dtype=torch.float32)
    x = torch.randn(3, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "LoraLinear" not in str(net(x).grad_fn)
    handle.add(lt.LoraConfig(r=2, target_modules=["q"]), name="second")
    handle.activate("default", "second")
    assert "LoraLinear" not in str(net(x).grad_fn)


class Three(nn.Module):
    """Projections of one input, of different widths."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(5, width, bias=bias) for width in (7, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(together([self.q, self.k, self.v], x), -1)


def three(*, base_bias: bool = True, **config: Any) -> tuple[Three, lt.Adapters]:
    torch.manual_seed(0)
    net = Three(base_bias).double()
    targets = config.pop("target_modules", ["q", "k", "v"])
    handle = lt.attach(net, lt.LoraConfig(r=2, lora_alpha=3, target_modules=targets, **config), dtype=torch.float64)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return net, handle


ONE_STEP: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"base_bias": False},
    "trained biases": {"bias": "all"},
    "other ranks and scales": {"rank_pattern": {"k": 3}, "alpha_pattern": {"v": 1}},
    "counted from its start": {"init_lora_weights": "pissa"},
    "biases behind B": {"lora_bias": True},
}
APART: dict[str, dict[str, Any]] = {
    "one has no adapter": {"target_modules": ["q", "v"]},
    "dropout": {"lora_dropout": 0.5},
    "DoRA": {"use_dora": True},
}


@pytest.mark.parametrize("case", [*ONE_STEP, *APART])
def test_together_they_give_what_each_gives(case: str) -> None:
    net, handle = three(**(ONE_STEP | APART)[case])
    net.train()
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x, *handle.parameters()]
    with handle.counting(TokenCounter(0, 3, torch.arange(8).view(2, 4))):
        found, expected = net(x), torch.cat([net.q(x), net.k(x), net.v(x)], -1)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
        grad = torch.randn_like(expected)
        differentiable = torch.autograd.grad(found, inputs, grad, create_graph=True)
        mine, theirs = (torch.autograd.grad(y, inputs, grad) for y in (found, expected))
    assert_close(list(mine), list(theirs), rel=1e-12)
    assert_close([gradient.detach() for gradient in differentiable], list(theirs), rel=1e-12)
    steps = {node for node, _ in found.grad_fn.next_functions}
    assert (len(steps) == 1) == (case in ONE_STEP and case != "biases behind B")


def test_gradients_gradient_of_several() -> None:
    net, handle = three()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda *_: net(x), (x, *handle.parameters()))


def test_whoever_listens_to_a_projection_hears_it() -> None:
    net, _ = three()
    heard: list[str] = []
    net.k.register_forward_hook(lambda *_: heard.append("k"))
    net(torch.randn(3, 5, dtype=torch.float64))
    assert heard == ["k"]


def test_frozen_ones_get_no_gradient() -> None:
    net, handle = three()
    handle.freeze("default")
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    net(x).sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in handle.parameters())


def test_gradients_of_several_are_tensors_of_their_own() -> None:
    net, handle = three()
    net(torch.randn(3, 5, dtype=torch.float64)).sum().backward()
    storages = {p.grad.untyped_storage().data_ptr() for p in handle.parameters() if p.grad is not None}
    assert len(storages) == len(list(handle.parameters()))


def test_whoever_listens_to_all_modules_hears_each_projection() -> None:
    net, _ = three()
    heard: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(module))
    try:
        net(torch.randn(3, 5, dtype=torch.float64))
    finally:
        handle.remove()
    assert {id(net.q), id(net.k), id(net.v)} <= {id(module) for module in heard}


@pytest.mark.parametrize("between", ["eval", "train"])
def test_a_change_of_mode_before_the_backward_pass_changes_no_gradient(between: str) -> None:
    net, handle = adapted(lora_dropout=0.5)
    net.train(between == "eval")
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    gradients = []
    for change in (False, True):
        net.train(between == "eval")
        with handle.counting(TokenCounter(0, 3, torch.arange(8).view(2, 4))):
            loss = net(x).square().sum()
            if change:
                net.train(between == "train")
            gradients.append(torch.autograd.grad(loss, handle.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class Held(NamedTuple):
    """A weight that lasts, or one that is decoded into the place of the one before."""

    weight: Tensor
    lasting: bool
    place: Tensor
    version: int = 0

    def lent(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.weight if self.lasting else self.place.copy_(self.weight)

    dense = lent

    def computed_by(self, forward: Any) -> bool:
        return True


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("lasting", list(itertools.product([True, False], repeat=3)))
def test_the_inputs_gradient_whatever_lasts(lasting: tuple[bool, ...], dropped: bool) -> None:
    torch.manual_seed(0)
    place = torch.full((7, 5), torch.nan, dtype=torch.float64)
    weights = [torch.randn(7, 5, dtype=torch.float64) for _ in lasting]
    frozen = [Frozen(Held(w, one, place), 0, 1.0) for w, one in zip(weights, lasting, strict=True)]
    grads = [torch.randn(4, 7, dtype=torch.float64) for _ in lasting]
    A, gh = torch.randn(6, 5, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    found = of_input(frozen, (lambda t: t * 0.25) if dropped else None, torch.Size((2, 2, 5)), A, grads, gh)
    expected = sum(gy @ w for gy, w in zip(grads, weights, strict=True)) + gh @ A * (0.25 if dropped else 1.0)
    torch.testing.assert_close(found, expected.view(2, 2, 5))
