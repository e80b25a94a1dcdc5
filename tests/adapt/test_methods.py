"""VeRA and (IA)³ on every kind of layer that they are for, behind the handle, and in peft's files both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loratune as lt
from loratune.errors import AdapterFileError, AdapterStateError, ConfigError, TargetError
from loratune.lora import TokenCounter, Vera, together
from loratune.lora.dropout import drop
from tests.adapt.kinds import KINDS, Around, around, by_position, columns_of, matrix_of
from tests.adapt.lifecycle import from_attach_to_detach
from tests.adapt.model import bits
from tests.adapter.cases import gap as gap_of
from tests.adapter.cases import logits
from tests.models import tiny
from tests.oracle import vectors
from tests.oracle.lora_reference import Array, exact

LINEAR = ("Linear", "Conv1D", "Mine")
LOOKUPS = tuple(name for name, kind in KINDS.items() if kind.is_lookup)
# Method → the settings that make one of its adapters, and its word in files.
METHODS: dict[str, dict[str, Any]] = {
    "vera": {"peft_type": "VERA", "r": 3},
    "outputs": {"peft_type": "IA3", "feedforward_modules": []},
    "inputs": {"peft_type": "IA3", "feedforward_modules": ["layer"]},
}
CASES = [
    (name, method)
    for method in METHODS
    for name in KINDS
    if name in LINEAR or (name not in LOOKUPS and method != "vera")
]
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def config_of(method: str, **changes: Any) -> lt.LoraConfig:
    return lt.LoraConfig(**{**METHODS[method], "target_modules": ["layer"], **changes})


def move(handle: lt.Adapters, name: str | None = None, seed: int = 0) -> None:
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters(name):
            parameter.add_(torch.randn(parameter.shape, generator=dice).to(parameter.dtype) * 0.4)


def moved(name: str, method: str, dtype: torch.dtype = torch.float32) -> tuple[Around, Tensor, lt.Adapters]:
    model, x = around(KINDS[name], dtype)
    handle = lt.attach(model, config_of(method))
    move(handle)
    return model, x, handle


def gap(ours: Array, reference: Array) -> float:
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def bias_of(layer: Any) -> Array:
    bias = getattr(layer, "bias", None)
    return np.zeros(len(matrix_of(layer))) if bias is None else exact(bias)


def vera_of(term: Any) -> vectors.Vera:
    A, B = term.frozen()
    return vectors.Vera(exact(A), exact(B), exact(term.d), exact(term.b))


def expected_of(layer: Any, x: Tensor, term: Any) -> Array:
    W, bias, seen = matrix_of(layer), bias_of(layer), columns_of(layer, x)
    if isinstance(term, Vera):
        return vectors.vera_forward(W, bias, seen, vera_of(term))
    return vectors.rescaled_forward(W, bias, seen, exact(term.l), on_input=bool(term.on_input))


@pytest.mark.parametrize(("name", "method"), CASES)
def test_output_and_gradients_are_the_references(name: str, method: str) -> None:
    model, x, handle = moved(name, method)
    layer: Any = model.layer
    (term,) = handle.terms().values()
    x.requires_grad_(True)
    y = layer(x)
    assert gap(by_position(layer, y), expected_of(layer, x, term)) < 1e-5
    dice = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * dice).sum().backward()
    W, bias, seen, g = matrix_of(layer), bias_of(layer), columns_of(layer, x), by_position(layer, dice)
    if isinstance(term, Vera):
        to_x, to_d, to_b = vectors.vera_gradients(W, seen, g, vera_of(term))
        assert gap(exact(term.d.grad), to_d) < 1e-5
        assert gap(exact(term.b.grad), to_b) < 1e-5
        assert gap(exact(x.grad).reshape(to_x.shape), to_x) < 1e-5
    else:
        to_l = vectors.rescaled_gradient(W, bias, seen, g, exact(term.l), on_input=bool(term.on_input))
        assert gap(exact(term.l.grad), to_l) < 1e-5
    assert all(p.grad is None for _, p in handle.base_parameters() if p is not x)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_from_attach_to_detach(tmp_path: Path, name: str, method: str) -> None:
    plain, x = around(KINDS[name])
    from_attach_to_detach(plain, x, config_of(method), tmp_path)


PAIRS = [(*case, beside) for case in CASES for beside in (*METHODS, "lora") if beside != "vera" or case[0] in LINEAR]


@pytest.mark.parametrize(("name", "method", "beside"), PAIRS)
def test_updates_of_several_add_up(name: str, method: str, beside: str) -> None:
    model, x, handle = moved(name, method)
    r = KINDS[name].r
    handle.add(lt.LoraConfig(r=r, target_modules=("layer",)) if beside == "lora" else config_of(beside), "other")
    move(handle, "other", seed=1)
    layer: Any = model.layer
    with handle.disabled():
        base = layer(x)
    alone = []
    for adapter in ("default", "other"):
        handle.activate(adapter)
        alone.append(layer(x) - base)
    handle.activate("default", "other")
    assert torch.allclose(layer(x), base + alone[0] + alone[1], atol=1e-5)
    if beside != "lora" or KINDS[name].merges:
        expected = model(x)
        handle.merge()
        assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_coarse_base_gives_its_own_dtype(name: str, method: str) -> None:
    model, x = around(KINDS[name], torch.bfloat16)
    handle = lt.attach(model, config_of(method))
    layer: Any = model.layer
    (term,) = handle.terms().values()
    move(handle)
    assert layer(x).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in term.parameters())
    assert gap(by_position(layer, layer(x)), expected_of(layer, x, term)) < 8 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("method", ["outputs", "inputs"])
def test_a_factor_is_not_rounded(method: str) -> None:
    """bf16 has steps of 1/128 above 1: there a factor of 1.003 would be 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).to(torch.bfloat16)
    settings = {**METHODS[method], "target_modules": ("0",)}
    settings["feedforward_modules"] = ("0",) if method == "inputs" else ()
    handle = lt.attach(model, lt.LoraConfig(**settings))
    x = torch.randn(64, 64, dtype=torch.bfloat16)
    with handle.disabled():
        base = model(x).double()
    with torch.no_grad():
        handle.parameters()[0].fill_(1.003)
    factor = float((model(x).double() * base).sum() / base.square().sum())
    assert abs(factor - 1.003) < 3e-4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["Linear", "Mine"])
def test_it_is_one_graph(name: str, method: str) -> None:
    model, x, handle = moved(name, method)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), model(x), atol=1e-5)
    with handle.disabled():
        assert torch.allclose(compiled(x), model(x), atol=1e-5)
    torch._dynamo.reset()


# -- VeRA: one A for all ---------------------------------------------------------------------------------------------


class Side(nn.Module):
    """Three projections of one input, of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 5), nn.Linear(6, 3), nn.Linear(6, 8)
        self.o = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = together([self.q, self.k, self.v], x)
        result: Tensor = self.o(v) + q[..., :4] + k.sum(-1, keepdim=True)
        return result


def side(**changes: Any) -> tuple[Side, lt.Adapters, Tensor]:
    torch.manual_seed(0)
    model = Side()
    handle = lt.attach(model, lt.LoraConfig(peft_type="VERA", r=4, target_modules=("q", "k", "v", "o"), **changes))
    move(handle)
    return model, handle, torch.randn(2, 7, 6, requires_grad=True)


def grads(model: Side, handle: lt.Adapters, x: Tensor, **options: Any) -> list[Tensor]:
    model.zero_grad()
    x.grad = None
    with handle.counting(TokenCounter(3, 0, torch.arange(14), **options)):
        model(x).square().sum().backward()
    return [x.grad, *(p.grad for p in handle.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_layers_that_see_the_same_share_what_they_are_given(dropout: float) -> None:
    model, handle, x = side(lora_dropout=dropout)
    model.train()
    found = grads(model, handle, x)
    # A hook keeps every layer by itself.
    hooks = [module.register_forward_hook(lambda *_: None) for module in (model.q, model.k, model.v)]
    apart = grads(model, handle, x)
    for hook in hooks:
        hook.remove()
    for ours, other in zip(found, apart, strict=True):
        assert torch.allclose(ours, other, rtol=1e-5, atol=1e-5)


def test_dropout_is_of_what_a_sees() -> None:
    model, handle, x = side(lora_dropout=0.5)
    model.train()
    low_rank: Any = model.q.lora["default"]
    counter = TokenCounter(3, 0, torch.arange(14).view(2, 7))
    with handle.counting(counter):
        found = model.q(x)
    A, B = low_rank.factors()
    seen = drop(x, 0.5, counter, model.q.lora_index)  # type: ignore[arg-type]
    assert not torch.equal(seen, x)
    weight = model.q._parameters["weight"]
    assert weight is not None
    expected = F.linear(x, weight.detach(), model.q.bias) + F.linear(F.linear(seen, A), B)
    torch.testing.assert_close(found, expected)
    inputs = [x, *low_rank.parameters()]
    ours, theirs = (torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_all_layers_share_the_projections() -> None:
    model, handle, _ = side()
    terms: list[Any] = list(handle.factors().values())
    assert len({id(term.projections) for term in terms}) == 1
    A, B = terms[0].projections.A, terms[0].projections.B
    assert (A.shape, B.shape) == ((4, 8), (8, 4))
    copied: Any = copy.deepcopy(model)
    others: list[Any] = list(lt.adapters(copied).factors().values())
    assert len({id(term.projections) for term in others}) == 1
    assert others[0].projections is not terms[0].projections
    assert not any("projections" in key for key in model.state_dict())


def test_of_the_input_nothing_is_kept() -> None:
    """Of x (2, 7, 6) autograd keeps A x alone, (14, 4)."""
    model, handle, _ = side()
    x = torch.randn(2, 7, 6)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        together([model.q, model.k, model.v], x)
    assert not any(tensor.shape[-1] == 6 and tensor.numel() == x.numel() for tensor in kept)
    assert [tuple(t.shape) for t in kept].count((14, 4)) == 1
    assert handle.active


def test_a_seed_is_enough_to_find_the_projections_again(tmp_path: Path) -> None:
    model, x = around(KINDS["Linear"])
    handle = lt.attach(model, config_of("vera", save_projection=False, projection_prng_key=7))
    move(handle)
    handle.save(tmp_path)
    assert sorted(load_file(tmp_path / TENSORS)) == [
        "base_model.model.layer.vera_lambda_b",
        "base_model.model.layer.vera_lambda_d",
    ]
    again, _ = around(KINDS["Linear"])
    lt.attach(again, tmp_path)
    assert bits(again(x)) == bits(model(x))
    other, _ = around(KINDS["Linear"])
    theirs = peft.PeftModel.from_pretrained(other, tmp_path)
    assert torch.allclose(theirs(x), model(x), atol=1e-5)


def test_a_start_without_init_is_random() -> None:
    for method in METHODS:
        model, x = around(KINDS["Linear"])
        base = model(x)
        handle = lt.attach(model, config_of(method, init_lora_weights=False))
        assert not torch.allclose(model(x), base, atol=1e-3)
        values = [p.detach().clone() for p in handle.parameters()]
        again, _ = around(KINDS["Linear"])
        same = lt.attach(again, config_of(method, init_lora_weights=False)).parameters()
        assert all(torch.equal(a, b) for a, b in zip(values, same, strict=True))


# -- peft ------------------------------------------------------------------------------------------------------------

# peft has no (IA)³ for a Conv1d, and knows layers of somebody's own by their class.
AS_PEFT = [(name, method) for name, method in CASES if name not in ("Mine", "Conv1d", "circular", "by channel")]


def peft_config(method: str, **changes: Any) -> Any:
    settings = {**METHODS[method], "target_modules": ["layer"], **changes}
    kind = peft.VeraConfig if settings.pop("peft_type") == "VERA" else peft.IA3Config
    return kind(**settings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "method"), AS_PEFT)
def test_peft_reads_ours(tmp_path: Path, name: str, method: str) -> None:
    model, x, handle = moved(name, method)
    handle.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(around(KINDS[name])[0], tmp_path).eval()
    assert torch.allclose(theirs(x), model(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "method"), AS_PEFT)
def test_ours_reads_pefts(tmp_path: Path, name: str, method: str) -> None:
    base, x = around(KINDS[name])
    theirs = peft.get_peft_model(base, peft_config(method)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4) if parameter.requires_grad else None
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model, _ = around(KINDS[name])
    handle = lt.attach(model, tmp_path / "theirs")
    assert torch.allclose(model(x), theirs(x), atol=1e-5)
    handle.save(tmp_path / "ours")
    ours, first = (load_file(tmp_path / folder / TENSORS) for folder in ("ours", "theirs"))
    assert ours.keys() == first.keys()
    assert all(torch.equal(ours[key], first[key]) for key in ours)


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vera preset": ("llama", {"peft_type": "VERA", "r": 4}),
    "vera everywhere": ("llama", {"peft_type": "VERA", "r": 4, "target_modules": "all-linear"}),
    "vera and a head": ("llama", {"peft_type": "VERA", "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "vera of one layer": (
        "llama",
        {"peft_type": "VERA", "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "vera and biases": ("gpt2", {"peft_type": "VERA", "target_modules": ["c_attn"], "bias": "lora_only"}),
    "vera and every bias": ("gpt2", {"peft_type": "VERA", "target_modules": ["c_attn"], "bias": "all"}),
    "vera gpt2": ("gpt2", {"peft_type": "VERA", "r": 5, "target_modules": ["c_attn", "c_proj"]}),
    "ia3 preset": ("llama", {"peft_type": "IA3"}),
    "ia3 gpt2 preset": ("gpt2", {"peft_type": "IA3"}),
    "ia3 everywhere": ("llama", {"peft_type": "IA3", "target_modules": "all-linear"}),
    "ia3 outputs": (
        "llama",
        {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": []},
    ),
    "ia3 but": ("llama", {"peft_type": "IA3", "target_modules": "all-linear", "exclude_modules": ["q_proj"]}),
    "ia3 and a norm": ("gpt2", {"peft_type": "IA3", "target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}),
}
# What they say otherwise in a config of peft's, or have no word for.
OF_PEFT: dict[str, dict[str, Any]] = {
    "vera and biases": {"bias": "vera_only"},
    "ia3 everywhere": {"feedforward_modules": ["down_proj"]},
    "ia3 but": {"feedforward_modules": ["down_proj"]},
    "ia3 and a norm": {"feedforward_modules": []},
}


def model_of(case: str) -> Any:
    return tiny(MODELS[case][0])


def ours_of(case: str) -> tuple[nn.Module, lt.Adapters]:
    model = model_of(case)
    handle = lt.attach(model, lt.LoraConfig(**MODELS[case][1]))
    move(handle)
    return model, handle


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", MODELS)
def test_whole_models_both_ways(tmp_path: Path, case: str) -> None:
    model, handle = ours_of(case)
    before = logits(model_of(case))
    assert gap_of(logits(model), before) > 0.01, "the adapter must matter for this to say anything"
    handle.save(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(model_of(case), tmp_path / "ours").eval()
    assert gap_of(logits(loaded), logits(model)) < 1e-5
    settings = {**MODELS[case][1], **OF_PEFT.get(case, {})}
    kind = peft.VeraConfig if settings.pop("peft_type") == "VERA" else peft.IA3Config
    theirs = peft.get_peft_model(model_of(case), kind(**settings)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2) if parameter.requires_grad else None
    theirs.save_pretrained(str(tmp_path / "theirs"))
    other = model_of(case)
    again = lt.attach(other, tmp_path / "theirs")
    assert gap_of(logits(other), logits(theirs)) < 1e-5
    again.save(tmp_path / "again")
    first, second = (json.loads((tmp_path / folder / CONFIG).read_text()) for folder in ("theirs", "again"))
    # Names of the same modules may be others.
    free = (
        "auto_mapping", "base_model_name_or_path", "target_modules", "task_type", "exclude_modules", "layers_pattern",
        "feedforward_modules",
    )  # fmt: skip
    assert {k: v for k, v in first.items() if k not in free} == {k: v for k, v in second.items() if k not in free}
    ours, copied = (load_file(tmp_path / folder / TENSORS) for folder in ("theirs", "again"))
    assert ours.keys() == copied.keys()
    assert all(torch.equal(ours[key], copied[key]) for key in ours)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_settings_of_another_method_are_refused_all_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        lt.LoraConfig(peft_type="IA3", r=4, lora_alpha=3, use_dora=True, bias="all", init_lora_weights="pissa")
    assert len(raised.value.problems) == 5
    assert "r=4: (IA)³ has no such setting" in str(raised.value)
    with pytest.raises(ConfigError, match="lora_alpha=3: VeRA has no such setting"):
        lt.LoraConfig(peft_type="VERA", lora_alpha=3)
    with pytest.raises(ConfigError, match=r"d_initial=0\.3: LoRA has no such setting"):
        lt.LoraConfig(d_initial=0.3)
    with pytest.raises(ConfigError, match="should be 'LORA', 'VERA' or 'IA3'"):
        lt.LoraConfig(peft_type="OFT")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LOOKUPS[:1])
@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_is_not_for_is_refused_by_name(name: str, method: str) -> None:
    model, x = around(KINDS[name])
    before = bits(model(x))
    with pytest.raises(TargetError, match=r"layer: peft_type='(VERA|IA3)' is for linear layers"):
        lt.attach(model, config_of(method))
    assert bits(model(x)) == before
    convolution, _ = around(KINDS["Conv2d"])
    if method == "vera":
        with pytest.raises(TargetError, match=r"is for linear layers\nhint"):
            lt.attach(convolution, config_of(method))


def test_inputs_are_those_of_targets() -> None:
    model = tiny("llama")
    with pytest.raises(TargetError) as raised:
        lt.attach(
            model,
            lt.LoraConfig(peft_type="IA3", target_modules=("k_proj",), feedforward_modules=("down_proj", "dwn_proj")),
        )
    assert "feedforward_modules: 'dwn_proj' matches no module; did you mean 'down_proj'?" in str(raised.value)
    assert "feedforward_modules: model.layers.0.mlp.down_proj is no target" in str(raised.value)


def test_rows_of_a_batch_have_vera_and_not_ia3() -> None:
    model = tiny("llama").eval()
    ids = torch.randint(0, 60, (2, 5))
    handle = lt.attach(model, lt.LoraConfig(peft_type="VERA", r=4), name="a")
    move(handle, "a")
    handle.activate("a")
    alone = model(ids).logits
    with handle.disabled():
        base = model(ids).logits
    with handle.rows([None, "a"]), torch.no_grad():
        mixed = model(ids).logits
    assert torch.allclose(mixed[0], base[0], atol=1e-5)
    assert torch.allclose(mixed[1], alone[1], atol=1e-5)
    handle.add(lt.LoraConfig(peft_type="IA3"), "b")
    with pytest.raises(AdapterStateError, match=r"'b' is an \(IA\)³ adapter"), handle.rows(["a", "b"]):
        pass


def test_what_another_adapter_has_its_own_of_is_not_rescaled() -> None:
    model = tiny("gpt2")
    handle = lt.attach(model, lt.LoraConfig(peft_type="IA3", target_modules=("c_attn",)), name="scaled")
    handle.add(lt.LoraConfig(target_modules=("mlp.c_fc",), bias="all"), "biased")
    with pytest.raises(AdapterStateError, match=r"'scaled' is \(IA\)³, which rescales what the base gives"):
        handle.activate("scaled", "biased")
    assert handle.active == ("scaled",)


def _without(key: str) -> Any:
    return lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(key)}


DAMAGES: dict[str, tuple[str, Any, str]] = {
    "no b": ("vera", _without("lambda_b"), r"layer\.vera_lambda_b is missing"),
    "no A": ("vera", _without("vera_A"), "not both are there"),
    "another rank": ("vera", lambda t: {**t, "base_model.vera_A": torch.ones(2, 5)}, "do not share a rank"),
    "a short d": (
        "vera",
        lambda t: {**t, "base_model.model.layer.vera_lambda_d": torch.ones(2)},
        "does not fit the projections' rank 3",
    ),
    "a narrow A": ("vera", lambda t: {**t, "base_model.vera_A": torch.ones(3, 4)}, "A has 4 columns"),
    "a long b": ("vera", lambda t: {**t, "base_model.model.layer.vera_lambda_b": torch.ones(9)}, "does not fit into B"),
    "a matrix": ("outputs", lambda _: {"base_model.model.layer.ia3_l": torch.ones(2, 2)}, "not a vector"),
    "whole numbers": ("outputs", lambda _: {"base_model.model.layer.ia3_l": torch.ones(4, 1).long()}, "not fp32"),
    "the other side": (
        "outputs",
        lambda _: {"base_model.model.layer.ia3_l": torch.ones(1, 5)},
        r"l \(1, 5\), expected \(4, 1\)",
    ),
    "an empty one": ("outputs", lambda _: {"base_model.model.layer.ia3_l": torch.ones(0, 1)}, "not a vector"),
    "eight bits": (
        "vera",
        lambda t: {**t, "base_model.model.layer.vera_lambda_d": torch.ones(3).to(torch.float8_e4m3fn)},
        "not fp32",
    ),
    "A in eight bits": ("vera", lambda t: {**t, "base_model.vera_A": torch.ones(3, 5).char()}, "do not share a rank"),
    "of LoRA": (
        "inputs",
        lambda _: {f"base_model.model.layer.lora_{x}.weight": torch.ones(s) for x, s in (("A", (2, 5)), ("B", (4, 2)))},
        "has low-rank tensors, and peft_type is 'IA3'",
    ),
    "NaN": ("inputs", lambda t: {k: v * float("nan") for k, v in t.items()}, "NaN or infinity"),
    "a stranger": ("inputs", lambda t: {**t, "base_model.model.other.lora_A.weight": torch.ones(2, 2)}, "other"),
    "nothing": ("inputs", lambda _: {}, "holds no"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_and_nothing_changes(tmp_path: Path, damage: str) -> None:
    method, change, words = DAMAGES[damage]
    _, _, handle = moved("Linear", method)
    handle.save(tmp_path)
    save_file(change(dict(load_file(tmp_path / TENSORS))), tmp_path / TENSORS, metadata={"format": "pt"})
    model, x = around(KINDS["Linear"])
    before = bits(model(x))
    with pytest.raises(AdapterFileError, match=words):
        lt.attach(model, tmp_path)
    assert bits(model(x)) == before
    assert type(model.layer) is nn.Linear


@pytest.mark.parametrize(
    "key", ["bias", "d_initial", "r", "peft_type", "target_modules", "vera_dropout", "init_weights"]
)
@pytest.mark.parametrize("value", [["none"], {}, {"a": 1}, 1.5, "x", True], ids=str)
def test_a_damaged_config_is_refused_or_means_something(tmp_path: Path, key: str, value: Any) -> None:
    _, _, handle = moved("Linear", "vera")
    handle.save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, key: value}))
    model, x = around(KINDS["Linear"])
    before = bits(model(x))
    try:
        lt.attach(model, tmp_path)
    except lt.errors.LoratuneError:
        assert bits(model(x)) == before


def test_vectors_keep_their_own_dtypes(tmp_path: Path) -> None:
    _, _, handle = moved("Linear", "vera")
    handle.save(tmp_path / "first")
    tensors = load_file(tmp_path / "first" / TENSORS)
    tensors["base_model.model.layer.vera_lambda_d"] = tensors["base_model.model.layer.vera_lambda_d"].half()
    save_file(tensors, tmp_path / "first" / TENSORS, metadata={"format": "pt"})
    model, _ = around(KINDS["Linear"])
    lt.attach(model, tmp_path / "first").save(tmp_path / "second")
    again = load_file(tmp_path / "second" / TENSORS)
    assert all(torch.equal(again[key], tensor) and again[key].dtype == tensor.dtype for key, tensor in tensors.items())


def test_factors_near_one_are_not_kept_in_coarse_steps() -> None:
    model, x = around(KINDS["Linear"])
    before = bits(model(x))
    with pytest.raises(AdapterStateError, match="whose steps there are too wide"):
        lt.attach(model, config_of("outputs"), dtype=torch.bfloat16)
    assert bits(model(x)) == before
    assert type(model.layer) is nn.Linear


def test_without_targets_a_method_has_what_it_saves() -> None:
    model, _ = around(KINDS["Linear"])
    config = lt.LoraConfig(peft_type="VERA", target_modules="dummy-target-modules", modules_to_save=("head",))
    handle = lt.attach(model, config)
    assert set(handle.replaced()) == {"head.weight", "head.bias"}


def test_what_has_no_b_cannot_learn_it_faster() -> None:
    model, _ = around(KINDS["Linear"])
    handle = lt.attach(model, config_of("outputs"))
    with pytest.raises(ConfigError, match="no adapter here has a B"):
        handle.param_groups(1e-3, lora_plus_ratio=16)
    other, _ = around(KINDS["Linear"])
    rates = {g["lr"]: len(g["params"]) for g in lt.attach(other, config_of("vera")).param_groups(1e-3, 16)}
    assert rates == {1e-3: 1, 16e-3: 1}


def test_names_of_inputs_in_a_file_are_ends_of_paths(tmp_path: Path) -> None:
    """To peft "wo" is also the end of "two"."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wo, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.two(self.wo(x))
            return result

    torch.manual_seed(0)
    base, x = Two(), torch.randn(3, 4)
    config = peft.IA3Config(target_modules=["wo", "two"], feedforward_modules=["wo"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1 + torch.rand(parameter.shape)) if parameter.requires_grad else None
    theirs.save_pretrained(str(tmp_path))
    model = copy.deepcopy(base)
    lt.attach(model, tmp_path)
    assert torch.allclose(model(x), theirs(x), atol=1e-6)


def test_one_layer_in_another_dtype_leaves_the_projections_as_they_are() -> None:
    model, handle, x = side()
    A = handle.factors()["q"].projections.A.clone()  # type: ignore[union-attr]
    model.o.to(torch.bfloat16)
    assert torch.equal(handle.factors()["q"].projections.A, A)  # type: ignore[union-attr]
    assert model.q(x).dtype == torch.float32
