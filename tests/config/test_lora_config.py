"""`LoraConfig`: what it accepts, and that one error names everything wrong (BEHAVIOUR 1)."""

from __future__ import annotations

import math
import pickle
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.config import LoraConfig, patterns
from loratune.config.patterns import fully_matches, pattern_matches
from loratune.errors import ConfigError


def problems(**values: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**values)
    return caught.value.problems


def test_the_defaults() -> None:
    config = LoraConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (8, 16, 0.0, None)
    assert (config.init_lora_weights, config.use_rslora, config.task_type) == (True, False, None)
    assert (config.rank_pattern, config.alpha_pattern, config.layers_to_transform) == ({}, {}, None)


def test_every_problem_at_once_with_the_nearest_spelling() -> None:
    found = problems(
        r=-1,
        lora_dropout=7.0,
        init_lora_weights="gausian",
        bias="nope",
        lora_alhpa=3,
        target_modules="(",
        layers_to_transform=[-2],
        use_qalora=True,
    )
    assert len(found) == 8
    for name in ("r=-1", "lora_dropout=7.0", "init_lora_weights='gausian'", "bias='nope'", "use_qalora=True"):
        assert any(line.startswith(name) for line in found), (name, found)
    assert any("lora_alhpa" in line and "did you mean 'lora_alpha'?" in line for line in found)
    assert any("did you mean 'gaussian'?" in line for line in found)
    assert any("'(' is not a regular expression" in line for line in found)
    assert any("layer indices are whole numbers from 0" in line for line in found)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", 0),
        ("r", 8.0),
        ("r", True),
        ("r", "8"),
        ("r", None),
        ("lora_alpha", 0),
        ("lora_alpha", -1.0),
        ("lora_alpha", True),
        ("lora_alpha", math.nan),
        ("lora_alpha", math.inf),
        ("lora_dropout", -0.1),
        ("lora_dropout", 1.0),
        ("lora_dropout", math.nan),
        ("lora_dropout", False),
        ("target_modules", ""),
        ("target_modules", ()),
        ("target_modules", ["q_proj", 3]),
        ("target_modules", ["q_proj", ""]),
        ("target_modules", "*_proj"),
        ("target_modules", 5),
        ("exclude_modules", "["),
        ("layers_to_transform", "0"),
        ("layers_to_transform", [0, "1"]),
        ("layers_to_transform", True),
        ("rank_pattern", {"q": 0}),
        ("rank_pattern", {"q": 2.5}),
        ("rank_pattern", {"q": True}),
        ("rank_pattern", {"(": 4}),
        ("rank_pattern", ["q"]),
        ("alpha_pattern", {"q": -3}),
        ("alpha_pattern", {"q": math.nan}),
        ("alpha_pattern", {"q": math.inf}),
        ("alpha_pattern", {"q": "8"}),
        ("use_rslora", 1),
        ("use_rslora", "yes"),
        ("init_lora_weights", "pisa"),
        ("init_lora_weights", 1),
        ("task_type", "CAUSAL"),
        ("fan_in_fan_out", "no"),
    ],
)
def test_a_wrong_value_is_one_problem_that_names_its_setting(name: str, value: Any) -> None:
    found = problems(**{name: value})
    assert len(found) == 1
    assert found[0].startswith(f"{name}=")


@pytest.mark.parametrize(
    ("given_value", "expected"),
    [
        (["v_proj", "q_proj", "v_proj"], ("v_proj", "q_proj")),
        ({"v_proj", "q_proj"}, ("q_proj", "v_proj")),
        ("all-linear", "all-linear"),
        (r".*\.[qv]_proj", r".*\.[qv]_proj"),
    ],
)
def test_targets(given_value: Any, expected: Any) -> None:
    assert LoraConfig(target_modules=given_value).target_modules == expected


def test_other_spellings() -> None:
    config = LoraConfig(rank=4, alpha=8, dropout=0.1, targets=["a"], layers=3, layers_pattern="h", rslora=True)
    assert config == LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.1,
        target_modules=["a"],
        layers_to_transform=[3],
        layers_pattern=["h"],
        use_rslora=True,
    )
    assert LoraConfig(rank_pattern=None, alpha_pattern=None, fan_in_fan_out=None) == LoraConfig()


def test_one_setting_under_two_names() -> None:
    assert problems(r=4, rank=8) == ("rank=8 contradicts r=4: they are one setting",)
    assert LoraConfig(r=4, rank=4).r == 4


def test_it_cannot_be_changed_and_its_copies_are_checked() -> None:
    config = LoraConfig(r=4)
    with pytest.raises(Exception, match="frozen"):
        config.r = 5  # type: ignore[misc]
    assert config.replace(lora_alpha=3).lora_alpha == 3
    assert config.replace(lora_alpha=3).r == 4
    with pytest.raises(ConfigError):
        config.replace(r=0)
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(LoraConfig(r=4))
    assert len({config, LoraConfig(r=4), LoraConfig(r=5)}) == 2


# Two ways for each character, and no match: 2^31 of them in the path.
ENDLESS = "(?:.|.)*[!?]"
PATH = "model.layers.0.self_attn.q_proj"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("matches", [pattern_matches, fully_matches])
def test_a_pattern_without_an_end_is_given_up(matches: Callable[[str, str], bool]) -> None:
    begun = time.process_time()
    for path in [PATH] * 300:
        with pytest.raises(ConfigError, match="takes too long") as caught:
            matches(ENDLESS, path)
        assert repr(ENDLESS) in caught.value.problems[0]
        assert "(a+)+" in caught.value.hint
    assert time.process_time() - begun < 5


@pytest.mark.timeout(60)
def test_a_slow_pattern_has_one_second_for_all_paths() -> None:
    begun, held = time.process_time(), []
    slow = "(?:.|.)*[!#]"  # 2^17 ways: some milliseconds for each path

    def hold_against_all() -> None:
        held.extend(fully_matches(slow, f"{number:05d}.aaaaaaaaaaa") for number in range(100_000))

    with pytest.raises(ConfigError, match="takes too long"):
        hold_against_all()
    assert len(held) > 3
    assert not any(held)
    assert time.process_time() - begun < 5


def test_an_ordinary_pattern_never_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_PATIENCE", 0.01)  # for all, if each of these counted
    for number in range(20_000):
        assert pattern_matches(r"layers\.\d+\.self_attn\.[qkv]_proj", f"model.layers.{number}.self_attn.q_proj")


NAMES = ("q_proj", "model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head", "a.b", "Q.é")
PIECES = [".", ".*", r"\.", r"\d+", r"\w", "[qkv]", "[^.]+", "_proj", "q", "layers", "(a|b)", "(?:mlp|self_attn)"]
PIECES += [r"\{", r"\[:", "]", "}", "é", "(?i:Q)"]
PIECES += ["{2}", "{1,2}", "?", "*", "+", "|", "^", "$", r"\b", "(?=l)", "(?!q)", r"(\w)\1"]


@settings(derandomize=True, database=None, max_examples=500)
@given(pattern=st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join))
def test_patterns_mean_what_they_mean_to_python(pattern: str) -> None:
    try:
        LoraConfig(target_modules=pattern)
    except ConfigError:
        with pytest.raises(re.error):
            re.compile(pattern)
        return
    for name in NAMES:
        assert fully_matches(pattern, name) == bool(re.fullmatch(pattern, name))
        assert pattern_matches(pattern, name) == bool(re.fullmatch(rf"(.*\.)?({pattern})", name))


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(?:q_proj){e<=1}", "a brace that is no count"),
        ("[[:alpha:]]_proj", "a bracket before ':'"),
        ("(?:(?:(?:ab){1000}){1000}){1000}", "repeats its parts 1000000000 times"),
    ],
)
def test_what_another_reader_takes_otherwise_or_writes_out_is_refused(pattern: str, why: str) -> None:
    for values in ({"target_modules": pattern}, {"exclude_modules": pattern}, {"rank_pattern": {pattern: 2}}):
        (problem,) = problems(**values)
        assert why in problem
    assert fully_matches(r"\{e\[:\{", "{e[:{")
    assert LoraConfig(rank_pattern={r"\{e\[:\{": 2}).rank_of("x.{e[:{") == 2


@settings(derandomize=True, database=None)
@given(
    r=st.integers(1, 10_000),
    lora_alpha=st.one_of(st.integers(1, 999), st.floats(1e-6, 1e6)),
    lora_dropout=st.floats(0, 1, exclude_max=True),
    rank_pattern=st.dictionaries(st.text("abc.", min_size=1), st.integers(1, 99)),
)
def test_right_values_stay_what_they_are(**values: Any) -> None:
    config = LoraConfig(**values)
    assert {name: getattr(config, name) for name in values} == values
