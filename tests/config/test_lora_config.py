"""`LoraConfig`: what it accepts, and that one error names everything wrong (BEHAVIOUR 1)."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.config import LoraConfig
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
