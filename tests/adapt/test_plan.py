"""The target plan: which modules, with which rank and scale, and every refusal (BEHAVIOUR 2 to 6)."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import loratune as lt
from loratune.errors import ConfigError, TargetError
from tests.models import tiny
from tests.oracle import lora_reference as oracle


class Mixed(nn.Module):
    """Names that end alike, indices of experts inside layers, things that are no linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 6)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "q_proj": nn.Linear(6, 6),
                    "foo_q_proj": nn.Linear(6, 6),
                    "norm": nn.LayerNorm(6),
                    "experts": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 6)}) for _ in range(4)),
                }
            )
            for _ in range(3)
        )
        self.linear = nn.Linear(6, 6)


def paths(model: nn.Module, **settings: Any) -> list[str]:
    found = lt.plan(model, lt.LoraConfig(**settings))
    found.check()
    return [target.path for target in found.targets]


def problems(model: nn.Module, **settings: Any) -> tuple[str, ...]:
    config = lt.LoraConfig(**settings)
    found = lt.plan(model, config).problems
    state = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(TargetError) as caught:
        lt.attach(model, config)
    assert caught.value.problems == found
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == state
    assert [type(module) for module in model.modules()] == kinds
    return found


# -- which modules -----------------------------------------------------------------------------------------------------


def test_a_list_matches_names_and_dotted_ends() -> None:
    model = Mixed()
    assert paths(model, target_modules=["q_proj"]) == [f"layers.{i}.q_proj" for i in range(3)]
    assert paths(model, target_modules=["linear", "layers.1.foo_q_proj", "embed"]) == [
        "embed",
        "layers.1.foo_q_proj",
        "linear",
    ], "in the model's order"
    assert paths(model, target_modules=["2.up"]) == [f"layers.{i}.experts.2.up" for i in range(3)]


def test_a_string_is_a_regex_for_the_whole_path() -> None:
    model = Mixed()
    assert paths(model, target_modules=r"layers\.\d\.q_proj") == [f"layers.{i}.q_proj" for i in range(3)]
    assert problems(model, target_modules=r"q_proj")[0].endswith("the pattern 'q_proj' matches no module")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_pattern_that_runs_for_years_is_given_up(setting: str) -> None:
    endless = f"(?:.|.)*[!?]|{setting}"  # two ways for each character: 2^40 for each path
    wide = nn.ModuleDict({f"{'a' * 40}{i}": nn.Linear(2, 2) for i in range(50)})
    value = {endless: 3} if setting.endswith("pattern") else endless
    config = lt.LoraConfig(**{"target_modules": "all-linear", setting: value})
    for act in (lambda: lt.plan(wide, config), lambda: lt.attach(wide, config)):
        begun = time.process_time()
        with pytest.raises(ConfigError, match="takes too long") as caught:
            act()
        assert repr(endless) in caught.value.problems[0]
        assert time.process_time() - begun < 5
    assert all(type(module) is nn.Linear and module.weight.requires_grad for module in wide.values())


def test_all_linear_and_exclusions() -> None:
    model = Mixed()
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert paths(model, target_modules="all-linear") == linears
    assert len(linears) == 2 + 3 * 6
    left = paths(model, target_modules="all-linear", exclude_modules=["layers.0.q_proj", "up"])
    assert left == [path for path in linears if path != "layers.0.q_proj" and not path.endswith(".up")]
    assert paths(model, target_modules=["q_proj", "linear"], exclude_modules=r"layers\..*") == ["linear"]


def test_the_layer_index_is_the_outer_one() -> None:
    model = Mixed()
    assert paths(model, target_modules=["up"], layers_to_transform=[2]) == [
        f"layers.2.experts.{e}.up" for e in range(4)
    ]
    assert paths(model, target_modules=["up"], layers_to_transform=[3], layers_pattern=["experts"]) == [
        f"layers.{i}.experts.3.up" for i in range(3)
    ]
    assert paths(model, target_modules="all-linear", layers_to_transform=0) == [
        path for path, module in model.named_modules() if path.startswith("layers.0.") and isinstance(module, nn.Linear)
    ]


def test_each_name_that_matches_nothing_is_a_problem_with_the_nearest_name() -> None:
    found = problems(
        Mixed(),
        target_modules=["q_proj", "k_proj", "linaer", "norm"],
        exclude_modules=["v_proj"],
        layers_to_transform=[1, 7],
        rank_pattern={"nothing": 3},
        alpha_pattern={"embed": 3},
    )
    for part in (
        "target_modules: 'k_proj' matches no module",
        "'linaer' matches no module; did you mean 'linear'?",
        "layers.0.norm: a LayerNorm cannot be adapted",
        "exclude_modules: 'v_proj' matches no module",
        "no target in layer 7 (layers found: 0 to 2)",
        "pattern 'nothing' matches no adapted module",
        "pattern 'embed' matches no adapted module",
    ):
        assert any(part in line for line in found), (part, found)
    assert len(found) == 9, "the norm of each of three layers"


def test_a_refusal_lists_the_models_linear_names() -> None:
    with pytest.raises(TargetError) as caught:
        lt.attach(Mixed(), lt.LoraConfig(target_modules=["typo"]))
    assert caught.value.hint == "linear modules of this model: embed, q_proj, foo_q_proj, up, linear"
    with pytest.raises(TargetError) as caught:
        lt.attach(nn.Sequential(nn.ReLU()), lt.LoraConfig(target_modules="all-linear"))
    assert caught.value.problems == ("nothing is left to adapt",)
    assert caught.value.hint == "it has no linear modules"


def test_other_refusals() -> None:
    assert "nothing is left" in problems(Mixed(), target_modules=["embed"], exclude_modules=["embed"])[0]
    assert problems(Mixed(), target_modules=["embed"], layers_pattern=["layers"]) == (
        "layers_pattern is given without layers_to_transform",
    )
    assert "no preset of targets for Mixed" in problems(Mixed())[0]
    assert "layers found: none" in problems(Mixed(), target_modules=["embed"], layers_to_transform=[0])[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.out = nn.Linear(8, 8)


def test_multihead_attention_would_never_call_an_adapter() -> None:
    model = Attention()
    assert paths(model, target_modules="all-linear") == ["out"]
    for name in ("out_proj", "attention.out_proj", "attention"):
        (problem,) = problems(model, target_modules=[name])
        assert problem.startswith(
            f"attention{'' if name == 'attention' else '.out_proj'}: a MultiheadAttention multiplies"
        )
        assert "take an attention whose projections are modules" in problem


def test_a_forward_of_somebody_elses_is_refused() -> None:
    model = Mixed()
    plain = model.embed.forward
    model.embed.forward = lambda x: plain(x) * 2  # type: ignore[method-assign]
    assert problems(model, target_modules=["embed", "linear"]) == (
        "embed: its forward is replaced on the instance, which would hide the adapter",
    )
    assert paths(model, target_modules=["linear"]) == ["linear"]


# -- rank and scale ----------------------------------------------------------------------------------------------------


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.embed, self.conv2d = (nn.Linear(40, 40) for _ in range(3))


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_set_ranks_and_scales(rslora: bool) -> None:
    config = lt.LoraConfig(
        r=25,
        lora_alpha=17,
        rank_pattern={"embed": 9, "conv2d": 16},
        alpha_pattern={"linear": 11, "conv2d": 13},
        target_modules="all-linear",
        use_rslora=rslora,
    )
    targets = {target.path: target for target in lt.plan(Named(), config).targets}
    assert {path: target.r for path, target in targets.items()} == {"linear": 25, "embed": 9, "conv2d": 16}
    expected = {"linear": 11 / 25, "embed": 17 / 9, "conv2d": 13 / 16}
    if rslora:
        expected = {"linear": 11 / 5, "embed": 17 / 3, "conv2d": 13 / 4}
    assert {path: target.scale for path, target in targets.items()} == pytest.approx(expected, rel=1e-15)


PATTERNS = st.lists(
    st.sampled_from(
        ["q_proj", r"layers\.\d\.q_proj", "proj", ".*proj", r"0\.q_proj", "^layers.*", "q_proj|linear", "up"]
    ),
    unique=True,
    min_size=1,
    max_size=4,
)


@settings(derandomize=True, deadline=None, max_examples=40, database=None)
@given(ranks=PATTERNS, alphas=PATTERNS)
def test_the_first_pattern_that_matches_wins(ranks: list[str], alphas: list[str]) -> None:
    rank_pattern = {pattern: number + 2 for number, pattern in enumerate(ranks)}
    alpha_pattern = {pattern: number + 30 for number, pattern in enumerate(alphas)}
    config = lt.LoraConfig(target_modules="all-linear", rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    found = lt.plan(Mixed(), config)
    for target in found.targets:
        r = oracle.pattern_value(rank_pattern, target.path, 8)
        assert target.r == r
        assert target.scale == oracle.pattern_value(alpha_pattern, target.path, 16) / r
    unmatched = {line.split("'")[1] for line in found.problems}
    assert unmatched == {"proj"} & {*ranks, *alphas}


def test_a_rank_beyond_the_weights_own_is_said() -> None:
    found = lt.plan(Named(), lt.LoraConfig(r=41, target_modules=["embed"]))
    assert any("rank 41 exceeds the weight's own 40" in note for note in found.notes)
    assert not lt.plan(Named(), lt.LoraConfig(r=40, target_modules=["embed"])).notes


# -- models of transformers --------------------------------------------------------------------------------------------

_WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
_LLAMA = {**_WIDE, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50}),
    "llama": ("LlamaConfig", _LLAMA),
}


def meta(config_class: str, auto: str = "AutoModelForCausalLM", **values: Any) -> nn.Module:
    config = getattr(transformers, config_class)(**values)
    with torch.device("meta"):
        model = getattr(transformers, auto).from_config(config)
    assert isinstance(model, nn.Module)
    return model


@pytest.mark.parametrize(
    ("family", "auto"),
    [
        ("llama", "AutoModelForSequenceClassification"),
        ("llama", "AutoModelForTokenClassification"),
        ("llama", "AutoModelForQuestionAnswering"),
        ("gpt2", "AutoModelForSequenceClassification"),
    ],
)
@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_all_linear_leaves_out_heads_of_classifiers(family: str, auto: str, task_type: str | None) -> None:
    config_class, values = CONFIGS[family]
    model = meta(config_class, auto, **values)
    heads = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path in ("score", "classifier", "qa_outputs")
    ]
    assert len(heads) == 1
    found = paths(model, target_modules="all-linear", task_type=task_type)
    assert heads[0] not in found
    assert len(found) == 2 * (7 if family == "llama" else 4)
    assert paths(model, target_modules=heads) == heads, "by name it can be adapted"


def test_a_head_of_ones_own_is_a_linear_like_any_other() -> None:
    assert paths(nn.ModuleDict({"classifier": nn.Linear(4, 4)}), target_modules="all-linear") == ["classifier"]


def test_conv1d_is_recognised_and_a_wrong_layout_is_said() -> None:
    gpt2, llama = tiny("gpt2"), tiny("llama")
    (first, *_) = lt.plan(gpt2, lt.LoraConfig(target_modules=["c_attn"])).targets
    assert (first.kind, first.in_features, first.out_features) == ("Conv1D", 32, 96)
    assert not lt.plan(gpt2, lt.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)).notes
    found = lt.plan(llama, lt.LoraConfig(target_modules=["q_proj"], fan_in_fan_out=True))
    assert not found.problems
    assert "fan_in_fan_out=True does not hold for Linear" in found.notes[0]
    handle = lt.attach(llama, lt.LoraConfig(target_modules=["q_proj"], fan_in_fan_out=True))
    assert handle.saved().config.fan_in_fan_out is False


def test_an_adapted_model_is_planned_as_its_base() -> None:
    model = tiny("llama")
    config = lt.LoraConfig(target_modules="all-linear")
    before = lt.plan(model, config)
    handle = lt.attach(model, config)
    assert lt.plan(model, config) == before
    handle.add(config, "second")
    assert lt.plan(model, config) == before
    assert set(handle.factors("second")) == set(handle.factors("default"))
    assert handle.count().total == before.total + before.trainable


# -- the notes' figures ------------------------------------------------------------------------------------------------


def plan_of(model: nn.Module, r: int, *targets: str) -> Any:
    found = lt.plan(model, lt.LoraConfig(r=r, target_modules=targets))
    found.check()
    return found


def test_gpt2_small_of_the_notes() -> None:
    # A block with separate projections of width 768, as the notes count it; OPT-125M has exactly these.
    attention = ("q_proj", "k_proj", "v_proj", "out_proj")
    opt = meta("OPTConfig")  # 12 layers of 768 are its defaults
    found = plan_of(opt, 8, *attention)
    assert {target.parameters for target in found.targets} == {12_288}
    assert sum(t.parameters for t in found.targets if ".layers.0." in t.path) == 49_152
    assert found.trainable == 589_824
    gpt2 = meta("GPT2Config")
    total = lt.plan(gpt2, lt.LoraConfig()).base_parameters
    assert round(total / 1e6) == 124
    assert 200 < total / found.trainable < 215


def test_gpt2_as_it_is() -> None:
    found = plan_of(meta("GPT2Config"), 8, "c_attn")
    assert found.trainable == 12 * 8 * (768 + 3 * 768)


def test_llama_7b_of_the_notes() -> None:
    model = meta("LlamaConfig")  # 32 layers of 4096 are its defaults
    found = plan_of(model, 16, "q_proj", "k_proj", "v_proj", "o_proj")
    assert {target.parameters for target in found.targets} == {131_072}
    assert sum(t.parameters for t in found.targets if ".layers.0." in t.path) == 524_288
    assert found.trainable == 16_777_216
    assert math.isclose(found.trainable / 1e6, 16.8, abs_tol=0.03)
    assert 6.7e9 < found.base_parameters < 6.8e9


def test_one_matrix_of_the_notes() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(512, 512, bias=False))
    (target,) = plan_of(model, 8, "0").targets
    assert (target.frozen, target.parameters) == (262_144, 8_192)
    assert 1 - target.parameters / target.frozen == pytest.approx(0.97, abs=0.005)


def test_gpt3_of_the_paper() -> None:
    values = {"hidden_size": 12288, "ffn_dim": 49152, "num_hidden_layers": 96, "num_attention_heads": 96}
    model = meta("OPTConfig", **values, word_embed_proj_dim=12288)
    found = plan_of(model, 4, "q_proj", "v_proj")
    assert found.trainable == 18_874_368
    assert round(found.base_parameters / 1e9) == 175
    # The paper's "10,000 times" is 175 B / 18.9 M, rounded up.
    assert 9_200 < found.base_parameters / found.trainable < 9_400
