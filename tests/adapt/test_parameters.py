"""Adapted parameters: stacked experts equal separate linears, and no delta of them is ever formed (BEHAVIOUR 7)."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import loratune as lt
from loratune.errors import AdapterStateError, TargetError
from loratune.lora.updated import _SAID
from tests.adapt.model import bits, picture
from tests.models import tiny
from tests.oracle import experts as oracle

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")
NAMES = ("experts.gate_up_proj", "experts.down_proj")
WAYS = ("eager", "grouped_mm", "batched_mm")
IDS = torch.tensor([[5, 6, 7, 8, 9], [30, 2, 31, 60, 61]])
FILES = ("adapter_model.safetensors", "adapter_config.json", "README.md")


def config(**changes: Any) -> lt.LoraConfig:
    return lt.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_parameters": NAMES, **changes})


def move(handle: lt.Adapters, name: str | None = None, seed: int = 0) -> None:
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters(name):
            parameter.add_(torch.randn(parameter.shape, generator=dice).to(parameter) * 0.3)


def moved(family: str = "mixtral", **changes: Any) -> tuple[Any, lt.Adapters]:
    model = tiny(family)
    handle = lt.attach(model, config(**changes))
    move(handle)
    return model, handle


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def gap(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def experts_of(model: Any, layer: int = 0) -> Any:
    return model.model.layers[layer].mlp.experts


# -- against separate linears ------------------------------------------------------------------------------------


def separate(module: Any, handle: lt.Adapters, path: str) -> tuple[list[oracle.Expert], dict[str, Tensor]]:
    """The experts of a module one by one, and the float64 twins of the adapter's tensors, which want gradients."""
    of = {name: handle.factors()[f"{path}.{name}"] for name in ("gate_up_proj", "down_proj")}
    twins = {
        f"{name}.{letter}": getattr(low_rank, letter).detach().double().requires_grad_()
        for name, low_rank in of.items()
        for letter in "AB"
    }

    def layer(name: str, e: int) -> oracle.Layer:
        W = module._parameters[name].detach().double()[e]
        b = module._parameters.get(f"{name}_bias")
        A, B, r = twins[f"{name}.A"], twins[f"{name}.B"], 3
        # As a file has them: A expert by expert, of B each column's experts side by side.
        A_e, B_e = A[e * r : (e + 1) * r], torch.stack([B[:, j * 4 + e] for j in range(r)], 1)
        return oracle.Layer(
            W.T if getattr(module, "is_transposed", False) else W, None if b is None else b.double()[e], A_e, B_e, 5 / 3
        )

    return [oracle.Expert(layer("gate_up_proj", e), layer("down_proj", e)) for e in range(4)], twins


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_separate_linears(family: str, way: str) -> None:
    model, handle = moved(family)
    model.set_experts_implementation(way)
    module = experts_of(model)
    dice = torch.Generator().manual_seed(3)
    x, g = torch.randn(6, 32, generator=dice), torch.randn(6, 32, generator=dice)
    chosen = torch.tensor([[0, 1], [1, 3], [3, 0], [0, 1], [1, 0], [3, 1]])  # nobody goes to expert 2
    weights = torch.rand(6, 2, generator=dice)
    x.requires_grad_()
    y = module(x, chosen, weights)
    (y * g).sum().backward()

    experts, twins = separate(module, handle, "model.layers.0.mlp.experts")
    x64 = x.detach().double().requires_grad_()
    expected = oracle.mixture(experts, module._apply_gate, x64, chosen, weights.double())
    (expected * g.double()).sum().backward()
    assert gap(y, expected) < 1e-5
    assert gap(x.grad, x64.grad) < 1e-5
    for name in ("gate_up_proj", "down_proj"):
        low_rank = handle.factors()[f"model.layers.0.mlp.experts.{name}"]
        assert gap(low_rank.A.grad, twins[f"{name}.A"].grad) < 1e-5
        assert gap(low_rank.B.grad, twins[f"{name}.B"].grad) < 1e-5
        assert low_rank.A.grad.view(4, 3, -1)[2].abs().max() == 0, "an expert without tokens learns nothing"


def apart(model: Any) -> Any:
    """The same mixtral with its experts as modules of linear layers, which an adapter is put on by their names."""

    class Expert(nn.Module):
        def __init__(self, module: Any, e: int) -> None:
            super().__init__()
            (up, inner), outer = module.gate_up_proj.shape[1:], module.down_proj.shape[1]
            self.gate_up_proj, self.down_proj = nn.Linear(inner, up, bias=False), nn.Linear(up // 2, outer, bias=False)
            self.gate_up_proj.weight.data = module.gate_up_proj[e].clone()
            self.down_proj.weight.data = module.down_proj[e].clone()

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.gate_up_proj(x).chunk(2, -1)
            y: Tensor = self.down_proj(F.silu(gate) * up)
            return y

    class Experts(nn.ModuleList):
        def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            y = torch.zeros_like(x)
            for e, expert in enumerate(self):
                token, k = torch.where(chosen == e)
                y = y.index_add(0, token, expert(x[token]) * weights[token, k, None])
            return y

    for layer in model.model.layers:
        layer.mlp.experts = Experts([Expert(layer.mlp.experts, e) for e in range(4)])
    return model


def test_a_whole_model_with_separate_experts_trains_alike() -> None:
    stacked, handle = moved()
    other = apart(tiny("mixtral"))
    theirs = lt.attach(other, lt.LoraConfig(r=3, lora_alpha=5, target_modules=["gate_up_proj", "down_proj"]))
    with torch.no_grad():
        for path, low_rank in handle.factors().items():
            owner, _, name = path.rpartition(".")
            for e, (A, B) in enumerate(low_rank.parts()):
                twin = theirs.factors()[f"{owner}.{e}.{name}"]
                twin.A.copy_(A)
                twin.B.copy_(B)
    assert gap(logits(stacked), logits(other)) < 1e-5
    for model in (stacked, other):
        F.cross_entropy(model(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    for path, low_rank in handle.factors().items():
        owner, _, name = path.rpartition(".")
        twins = [theirs.factors()[f"{owner}.{e}.{name}"] for e in range(4)]
        # An expert without tokens has no gradient there, and zeros here.
        to_A = torch.cat([torch.zeros_like(t.A) if t.A.grad is None else t.A.grad for t in twins])
        to_B = torch.stack([torch.zeros_like(t.B) if t.B.grad is None else t.B.grad for t in twins], -1)
        assert gap(low_rank.A.grad, to_A) < 1e-4
        assert gap(low_rank.B.grad, to_B.flatten(1)) < 1e-4
    assert sum(t.parameters for t in handle.plan().targets) == sum(t.parameters for t in theirs.plan().targets)


class Largest(TorchDispatchMode):
    """The most values that any tensor has which is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and not func.is_view:
            self.numel = max(self.numel, found.numel())
        return found


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_delta_is_ever_formed(family: str, way: str) -> None:
    """Not of all experts, and not of one: with few tokens everything made is smaller than one."""
    sizes = {"intermediate_size": 512, "moe_intermediate_size": 512}
    model = tiny(family, num_local_experts=4, num_experts=4, hidden_size=64, **sizes)
    model.set_experts_implementation(way)
    handle = lt.attach(model, config(r=1))
    module = experts_of(model)
    x = torch.randn(3, 64)
    chosen, weights = torch.tensor([[0, 1], [1, 3], [3, 0]]), torch.rand(3, 2)
    one = min(module._parameters[name][0].numel() for name in ("gate_up_proj", "down_proj"))
    with Largest() as made:
        module(x, chosen, weights).sum().backward()
    assert all(low_rank.B.grad is not None for path, low_rank in handle.factors().items() if ".0." in path)
    factors = max(p.numel() for p in handle.parameters()) * (4 if way == "grouped_mm" else 1)  # filled up to 4 ranks
    assert 0 < made.numel <= max(factors, 3 * 2 * 1024) < one


# -- the life of an adapter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_from_attach_to_detach(tmp_path: Path, family: str) -> None:
    model, plain_model = tiny(family), tiny(family)
    kinds = [type(module) for module in model.modules()]
    start = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    base = bits(logits(model))
    handle = lt.attach(model, config())
    assert bits(logits(model)) == base, "the start is the base"
    assert isinstance(experts_of(model), kinds[[*plain_model.modules()].index(experts_of(plain_model))])
    assert {name for name in model.state_dict() if name not in start} == {
        f"model.layers.{layer}.mlp.experts.lora_parameters.default.{name}.{letter}"
        for layer in (0, 1)
        for name in ("gate_up_proj", "down_proj")
        for letter in "AB"
    }
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS).logits.square().mean().backward()
        optimizer.step()
    assert {name: bits(tensor) for name, tensor in handle.base_state().items()} == start
    assert all(parameter.grad is None for _, parameter in handle.base_parameters())
    assert handle.count().trainable == handle.plan().trainable == sum(handle.plan().sizes())
    trained = logits(model)
    assert gap(trained, logits(plain_model)) > 1e-2
    with handle.disabled():
        assert bits(logits(model)) == base
    for _ in range(3):
        handle.merge()
        assert gap(logits(model), trained) < 1e-5
        handle.unmerge()
    assert {name: bits(tensor) for name, tensor in handle.base_state().items()} == start
    assert bits(logits(model)) == bits(trained)
    handle.save(tmp_path / "ours")
    again = lt.attach(plain_model, tmp_path / "ours")
    assert bits(logits(plain_model)) == bits(trained)
    again.save(tmp_path / "again")
    for file in FILES:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "ours")
    assert gap(logits(theirs.eval()), trained) < 1e-5
    handle.detach()
    assert {name: bits(tensor) for name, tensor in model.state_dict().items()} == start
    assert [type(module) for module in model.modules()] == kinds
    assert "lora_state" not in vars(experts_of(model))
    assert bits(logits(model)) == base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_is_rounded_once(dtype: torch.dtype) -> None:
    model = tiny("gpt_oss").to(dtype)
    handle = lt.attach(model, config())
    move(handle)
    before = experts_of(model)._parameters["gate_up_proj"].detach().double()
    low_rank = handle.factors()["model.layers.0.mlp.experts.gate_up_proj"]
    delta = torch.stack([(B.double() @ A.double()).T * 5 / 3 for A, B in low_rank.parts()])
    handle.merge(dtype=torch.float64, keep_base=False)
    merged = experts_of(model)._parameters["gate_up_proj"]
    exact = before + delta
    half = torch.finfo(dtype).eps / 2 * 2.0 ** exact.abs().log2().floor()
    assert bool(((merged.double() - exact).abs() <= half * (1 + 1e-6)).all()), "no neighbour is nearer"
    # Somebody else who looks at the parameter is given what is there.
    assert experts_of(model).gate_up_proj is merged


def test_several_adapters() -> None:
    """One on both parameters, one on the second and on modules, one on modules alone."""
    model = tiny("mixtral")
    handle = lt.attach(model, config())
    handle.add(config(target_parameters=("down_proj",), r=2, target_modules=["q_proj"]), "second")
    handle.add(lt.LoraConfig(r=2, target_modules=["v_proj"]), "third")
    base = None
    with handle.disabled():
        base = logits(model)
    for seed, name in enumerate(handle.names):
        move(handle, name, seed)
    alone = {}
    for name in handle.names:
        handle.activate(name)
        alone[name] = logits(model)
    handle.activate(*handle.names)
    together = logits(model)
    module = experts_of(model)
    terms = [handle.factors(name)["model.layers.0.mlp.experts.down_proj"] for name in ("default", "second")]
    deltas = [torch.stack([B @ A for A, B in each.parts()]) * each.scale for each in terms]
    assert gap(module.down_proj.detach(), module._parameters["down_proj"] + sum(deltas)) < 1e-6
    handle.merge()
    assert gap(logits(model), together) < 1e-5
    handle.unmerge()
    handle.rename("second", "other")
    assert bits(logits(model)) == bits(together)
    handle.activate()
    assert bits(logits(model)) == bits(base)
    handle.activate("third")
    handle.remove("default")
    handle.remove("other")
    assert type(experts_of(model)).__name__ == "MixtralExperts"
    assert bits(logits(model)) == bits(alone["third"])


@pytest.mark.parametrize("switched", [False, True])
def test_recomputed_blocks_see_the_adapters_of_their_forward_pass(switched: bool) -> None:
    model, handle = moved()
    handle.add(config(), "other")
    move(handle, "other", 1)
    model.train()
    model(IDS).logits.square().mean().backward()
    expected = {path: low_rank.A.grad.clone() for path, low_rank in handle.factors("default").items()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()
    loss = model(IDS).logits.square().mean()
    if switched:
        handle.activate("other")
    loss.backward()
    assert all(torch.equal(handle.factors("default")[path].A.grad, grad) for path, grad in expected.items())


def test_copies_and_pickles() -> None:
    model, handle = moved()
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert bits(logits(twin)) == bits(expected)
        move(lt.adapters(twin))
        assert gap(logits(twin), expected) > 1e-3
    assert bits(logits(model)) == bits(expected)
    assert handle.active == ("default",)


def test_a_bf16_base_and_autocast() -> None:
    model, handle = moved()
    # Given their tokens: a router chooses other experts where two are nearly alike in bf16.
    dice = torch.Generator().manual_seed(4)
    x, weights = torch.randn(6, 32, generator=dice), torch.rand(6, 2, generator=dice)
    chosen = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]])
    expected = experts_of(model)(x, chosen, weights)
    with handle.disabled():
        assert gap(experts_of(model)(x, chosen, weights), expected) > 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gap(experts_of(model)(x, chosen, weights), expected) < 0.02
    model.to(torch.bfloat16)
    assert {p.dtype for p in handle.parameters()} == {torch.bfloat16}
    low = tiny("mixtral").to(torch.bfloat16)
    handle = lt.attach(low, config())
    move(handle)
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    found = experts_of(low)(x.bfloat16(), chosen, weights.bfloat16())
    assert found.dtype == logits(low).dtype == torch.bfloat16
    assert gap(found, expected) < 0.02


def test_a_quantised_base_keeps_its_experts_as_they_are(tmp_path: Path) -> None:
    model = tiny("mixtral")
    lt.quantize(model, "int8")
    base = logits(model)
    handle = lt.attach(model, config(target_modules="all-linear"))
    assert torch.equal(logits(model), base)
    move(handle)
    on = logits(model)
    assert gap(on, base) > 1e-2
    handle.save(tmp_path)
    other = tiny("mixtral")
    lt.quantize(other, "int8")
    lt.attach(other, tmp_path)
    assert torch.equal(logits(other), on)


# -- other code than that of transformers' experts --------------------------------------------------------------------


class Odd(nn.Module):
    """Experts that do with their weights what nobody has foreseen."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 5, 4))
        self.table = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        by_einsum = torch.einsum("bi,eoi->beo", x, self.stack)
        weighed = (self.stack * 2.0).sum(0) + sum(self.stack.unbind())
        some = torch.stack([x @ each.T for each in (self.stack[0], self.stack[-1])])
        first = F.linear(x, self.stack[:, 0])
        assert len(self.stack) == 3
        assert (self.stack.shape, self.stack.size(1), self.table.dim()) == ((3, 5, 4), 5, 2)
        found = by_einsum.sum((1, 2)) + (x @ weighed.T).sum(1) + some.sum((0, 2)) + first.sum(1)
        y: Tensor = found + (x @ self.table).tanh().sum(1) + torch.addmv(found, x, self.table.mT[0])
        return y


def test_unknown_code_is_given_the_sum_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Odd())
    x = torch.randn(2, 4)
    base = model(x)
    handle = lt.attach(model, lt.LoraConfig(r=2, target_parameters=["0.stack", "0.table"]))
    assert torch.equal(model(x), base)
    move(handle)
    _SAID.clear()
    with caplog.at_level(logging.WARNING, "loratune"):
        y = model(x)
        y.sum().backward()
        said = [record.getMessage() for record in caplog.records]
        caplog.clear()
        model(x)
    assert said[0] == "Odd uses its adapted parameter in 'einsum', for which W + ΔW is formed whole in every pass"
    assert caplog.records == [], "each is said once"
    twin = Odd()
    for name in ("stack", "table"):
        getattr(twin, name).data = getattr(model[0], name).detach().clone()
    assert gap(y, twin(x)) < 1e-6
    twin(x).sum().backward()
    low_rank = handle.factors()["0.stack"]
    to_A = torch.cat([low_rank.scale * B.T @ g for (_, B), g in zip(low_rank.parts(), twin.stack.grad, strict=True)])
    assert gap(low_rank.A.grad, to_A) < 1e-5


@pytest.mark.parametrize("way", ["batched_mm", "grouped_mm"])
def test_a_compiled_model_computes_the_same(way: str) -> None:
    """Where the base's own experts can be compiled in one piece (its loop cannot), so can adapted ones."""
    base, (model, handle) = tiny("mixtral"), moved()
    for each in (base, model):
        each.set_experts_implementation(way)
    expected = logits(model)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(IDS).logits
    assert gap(y, expected) < 1e-5
    y.square().mean().backward()
    found = [parameter.grad.clone() for parameter in handle.parameters()]
    model.zero_grad()
    model(IDS).logits.square().mean().backward()
    assert all(gap(one, p.grad) < 1e-4 for one, p in zip(found, handle.parameters(), strict=True))
    with handle.disabled():
        assert torch.equal(logits(compiled), logits(base))


# -- the plan ------------------------------------------------------------------------------------------------------


def test_what_is_named() -> None:
    model = tiny("mixtral")
    full = [f"model.layers.{layer}.mlp.{name}" for layer in (0, 1) for name in NAMES]
    found = lt.plan(model, config())
    assert [target.path for target in found.targets] == full, "in the order in which they are registered"
    assert [target.filed for target in found.targets[:2]] == [
        "model.layers.0.mlp.experts.base_layer",
        "model.layers.0.mlp.experts",
    ]
    up, down = found.targets[:2]
    assert (up.kind, up.in_features, up.out_features, up.frozen) == ("MixtralExperts", 32, 128, 4 * 32 * 128)
    assert (up.parameters, down.parameters) == (4 * 3 * (32 + 128), 4 * 3 * (64 + 32))
    assert (up.multiplied, down.multiplied) == (up.parameters // 2, down.parameters // 2), "two of four are met"
    both = lt.plan(model, config(target_modules=["q_proj"], target_parameters=("down_proj",), r=2))
    assert [target.path.rpartition(".")[2] for target in both.targets] == ["q_proj"] * 2 + ["down_proj"] * 2
    router = lt.plan(model, config(target_parameters=("gate.weight",), r=2)).targets[0]
    assert (router.shapes, router.multiplied) == (((2, 32), (4, 2)), 2 * 36), "a matrix is a stack of one"
    patterns = {"rank_pattern": {r"layers\.1\..*down_proj": 1}, "alpha_pattern": {"experts.gate_up_proj": 9}}
    ranked = lt.plan(model, config(**patterns))
    assert [(target.r, round(target.scale, 3)) for target in ranked.targets] == [
        (3, 3.0),
        (3, 1.667),
        (3, 3.0),
        (1, 5.0),
    ]


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"layers_to_transform": [1]}, {1}),
        ({"exclude_modules": ["layers.0.mlp.experts"]}, {1}),
        ({"layers_to_transform": [0], "target_modules": ["q_proj"]}, {0}),
    ],
)
def test_layers_of_parameters_are_written_out_by_name(
    tmp_path: Path, changes: dict[str, Any], layers: set[int]
) -> None:
    """peft filters modules alone, so that the file says which parameters are meant."""
    model, handle = moved(**changes)
    assert {int(path.split(".")[2]) for path in handle.factors()} == layers
    handle.save(tmp_path)
    assert gap(logits(peft.PeftModel.from_pretrained(tiny("mixtral"), tmp_path).eval()), logits(model)) < 1e-5
    other = tiny("mixtral")
    lt.attach(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


def refused(model: Any, settings: lt.LoraConfig) -> tuple[str, ...]:
    before = [bits(tensor) for tensor in model.state_dict().values()], [type(module) for module in model.modules()]
    with pytest.raises(TargetError) as caught:
        lt.attach(model, settings)
    after = [bits(tensor) for tensor in model.state_dict().values()], [type(module) for module in model.modules()]
    assert before == after
    return caught.value.problems


def test_everything_that_stands_against_it_is_said_at_once() -> None:
    found = refused(
        tiny("mixtral"),
        config(
            target_parameters=("experts.gate_up_prj", "q_proj.weight", "experts.down_proj", "norm.weight"),
            target_modules=["q_proj", "nope"],
            lora_dropout=0.1,
            use_dora=True,
            init_lora_weights="pissa",
            modules_to_save=["layers.1.mlp"],
            rank_pattern={"k_proj": 2},
        ),
    )
    text = "\n".join(found)
    for part in (
        "'nope' matches no module",
        "target_parameters: 'experts.gate_up_prj' matches no parameter; did you mean 'experts.gate_up_proj'?",
        "there are gate.weight, experts.gate_up_proj, experts.down_proj",
        "model.layers.0.self_attn.q_proj.weight: it is the weight of a module that can be adapted itself",
        "model.norm.weight: it has the shape (32,), and only two or three dimensions can be adapted",
        "lora_dropout=0.1: target_parameters have updates of a weight",
        "use_dora=True is for modules, not for target_parameters",
        "init='pissa' is for modules, not for target_parameters",
        "layers.1.mlp.experts.down_proj: it is one of target_parameters, and modules_to_save has 'model.layers.1.mlp'",
        "pattern 'k_proj' matches no adapted module",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"lora_bias": True}, "lora_bias=True is for modules"),
        ({"init_lora_weights": "eva"}, "init='eva' is for modules"),
        ({"init_lora_weights": "loftq"}, "init='loftq' is for modules"),
        ({"init_lora_weights": "olora"}, "init='olora' is for modules"),
        ({"init_lora_weights": "orthogonal"}, "init='orthogonal' needs an even rank, not 3"),
        ({"target_parameters": ["keys"]}, "'keys' matches no parameter"),
    ],
)
def test_what_parameters_cannot_have(changes: dict[str, Any], why: str) -> None:
    assert any(why in problem for problem in refused(tiny("mixtral"), config(**changes)))


@pytest.mark.parametrize("init", [True, "gaussian", "swapped", "orthogonal", False])
def test_each_expert_starts_as_a_module_would(init: bool | str) -> None:
    model = tiny("mixtral")
    base = logits(model)
    torch.manual_seed(7)
    handle = lt.attach(model, config(r=4, init_lora_weights=init))
    first = {path: low_rank.A.clone() for path, low_rank in handle.factors().items()}
    for low_rank in handle.factors().values():
        experts = [A for A, _ in low_rank.parts()]
        inner = low_rank.A.shape[1]
        if init in (True, False):
            assert 0.9 * inner**-0.5 < float(low_rank.A.detach().abs().max()) <= inner**-0.5
        if init == "gaussian":
            assert 0.2 < float(low_rank.A.std()) < 0.3
        if init != "swapped":
            assert not any(torch.equal(experts[0], other) for other in experts[1:])
        assert (float(low_rank.B.abs().max()) > 0) == (init in (False, "swapped", "orthogonal"))
    found = logits(model)
    assert (gap(found, base) < 1e-6) == (init is not False)
    torch.manual_seed(7)
    again = lt.attach(tiny("mixtral"), config(r=4, init_lora_weights=init))
    assert all(torch.equal(again.factors()[path].A, A) for path, A in first.items())


def test_summary_and_refusals_of_mixed_batches() -> None:
    model, handle = moved()
    assert handle.summary().splitlines()[1:] == [
        "default (active): 6,144 in 4 modules",
        "  gate_up_proj (4 experts)    2 × (128 × 32), r=3: 1,920 each, 3,840",
        "  down_proj (4 experts)    2 × (32 × 64), r=3: 1,152 each, 2,304",
    ]
    before = picture(model, handle)
    with pytest.raises(AdapterStateError, match=r"'default' is on .*gate_up_proj .*, which cannot be mixed"):
        handle.mixed("default")
    with pytest.raises(AdapterStateError, match="which cannot be mixed"), handle.rows(["default", None]):
        pass
    expected = logits(model)
    with handle.rows(["default", "default"]):
        assert torch.equal(logits(model), expected)
    assert picture(model, handle) == before


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = owner._parameters[name]
    owner._parameters[name] = value
    try:
        yield
    finally:
        owner._parameters[name] = before


def test_a_parameter_that_is_another_by_now_is_not_merged_into() -> None:
    model, handle = moved()
    module = experts_of(model)
    other = nn.Parameter(module._parameters["down_proj"][:2].detach())
    why = "down_proj: it has another shape than when it was adapted"
    with replaced(module, "down_proj", other), pytest.raises(AdapterStateError, match=why):
        handle.merge()
    assert not handle.merged


# -- somebody looks at a parameter without wanting gradients -----------------------------------------------------------


def test_a_look_without_gradients_takes_none_away() -> None:
    """A hook that logs a norm, say, in the middle of the pass."""
    model, handle = moved()
    experts = experts_of(model)
    dice = torch.Generator().manual_seed(4)
    x, weights = torch.randn(3, 32, generator=dice), torch.rand(3, 2, generator=dice)
    chosen = torch.tensor([[0, 1], [1, 2], [2, 3]])

    def gradients() -> list[Tensor]:
        for parameter in handle.parameters():
            parameter.grad = None
        experts(x, chosen, weights).square().sum().backward()
        own = [low_rank for path, low_rank in handle.factors().items() if ".0." in path]
        return [gradient for each in own for gradient in (each.A.grad, each.B.grad) if gradient is not None]

    expected = gradients()
    assert len(expected) == 4

    def look(*_: Any) -> None:
        with torch.no_grad():
            assert float(experts.down_proj.norm()) > 0
            assert experts.gate_up_proj[0] is not None

    hooks = [experts.act_fn.register_forward_hook(look), experts.register_forward_pre_hook(look)]
    found = gradients()
    for hook in hooks:
        hook.remove()
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


class Own(nn.Module):
    """Code of its own that does to its weight what is written."""

    def __init__(self, do: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 4, 3))
        self.do = do

    def forward(self) -> Any:
        return self.do(self.w)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "do",
    [
        lambda w: w**2,
        abs,
        lambda w: (w == 0).float(),
        lambda w: (w != 0).float(),
        lambda w: (w > 0).float(),
        lambda w: 2.0 - w,
        lambda w: 1.0 / w,
        lambda w: torch.stack(list(w)),
        lambda w: F.linear(torch.ones(5, 3), w[0], torch.arange(4.0)),
        lambda w: torch.matmul(torch.ones(4), w[1]),
        lambda w: torch.ones(2, 4) @ w[1],
        lambda w: w[1] @ torch.ones(3),
        lambda w: w.transpose(0, 2),
        lambda w: w.transpose(1, 2),
        lambda w: w[torch.tensor([[1, 0]])],
        lambda w: torch.ones(w.size()) * w.size(1),
        lambda w: torch.bmm(torch.ones(2, 1, 4), w, out=torch.empty(2, 1, 3)) if not w.requires_grad else w,
    ],
)
def test_whatever_else_is_done_is_done_with_the_sum(do: Any) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"own": Own(do)})
    handle = lt.attach(model, lt.LoraConfig(r=2, target_parameters=("own.w",)))
    move(handle)
    module: Any = model["own"]
    whole = module.w.detach().clone()
    with torch.no_grad():
        assert torch.allclose(module(), do(whole), atol=1e-6)
