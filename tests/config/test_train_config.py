"""`TrainConfig`: methods as presets, contradictions, ranges."""

from __future__ import annotations

import math
from typing import Any

import pytest

from loratune.config import LoraConfig, TrainConfig, flag_of
from loratune.config.train import METHODS
from loratune.errors import ConfigError


def problems(**values: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**values)
    return caught.value.problems


def test_a_method_is_expanded() -> None:
    assert TrainConfig(method="lora").use_rslora is None
    assert TrainConfig(method="rslora").use_rslora is True
    assert TrainConfig(method="rslora", use_rslora=True).use_rslora is True


def test_a_flag_against_its_method_names_both() -> None:
    assert problems(method="rslora", use_rslora=False) == (
        "use_rslora=False contradicts method='rslora', which means use_rslora=True",
    )


def test_each_method_is_a_choice_and_fills_settings_that_exist() -> None:
    for method, implied in METHODS.items():
        config = TrainConfig(method=method)
        assert {name: getattr(config, name) for name in implied} == implied
    assert "'lora'" in problems(method="lorra")[0]


def test_every_problem_at_once() -> None:
    found = problems(rank=0, lr=-1.0, schedule="cosin", max_len=3, method="rslora", use_rslora=False, val=1.5)
    assert len(found) == 6
    for part in ("r=0", "lr=-1.0", "schedule='cosin'", "did you mean 'max_length'?", "use_rslora=False", "val=1.5"):
        assert any(part in line for line in found), (part, found)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", 2**63),
        ("batch_size", 0),
        ("epochs", 0),
        ("warmup", -0.1),
        ("warmup", 2.5),
        ("warmup", True),
        ("val", True),
        ("val", -1),
        ("val", -0.5),
        ("max_length", 1),
        ("lora_dropout", 1.0),
        ("lora_alpha", True),
        ("lora_alpha", math.inf),
        ("lr", math.nan),
        ("lr", math.inf),
        ("device", 0),
        ("pack", "yes"),
        ("columns", {"prompt": 1}),
    ],
)
def test_a_wrong_value_names_its_setting(name: str, value: Any) -> None:
    found = problems(**{name: value})
    assert len(found) == 1, found
    assert name in found[0]


@pytest.mark.parametrize(
    ("value", "expected"), [(0.1, 0.1), (100, 100), (20.0, 20), (0, 0), ("held.jsonl", "held.jsonl")]
)
def test_shares_and_counts(value: Any, expected: Any) -> None:
    config = TrainConfig(val=value)
    assert config.val == expected
    assert type(config.val) is type(expected)


def test_groups_without_shared_prefixes_are_a_contradiction() -> None:
    (found,) = problems(group_prefixes=True, share_prefixes=False)
    assert found == "group_prefixes=True contradicts share_prefixes=False: only shared prefixes gain by groups"
    for shared in (True, None):
        assert TrainConfig(group_prefixes=True, share_prefixes=shared).group_prefixes is True
    assert TrainConfig(group_prefixes=False, share_prefixes=False).group_prefixes is False


def test_what_both_classes_hold_is_one_setting() -> None:
    both = set(TrainConfig.names()) & set(LoraConfig.names())
    assert {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "init_lora_weights"} <= both
    for name in both:
        ours, theirs = TrainConfig.model_fields[name], LoraConfig.model_fields[name]
        assert ours.description == theirs.description
        assert flag_of(name, ours) == flag_of(name, theirs)
        assert ours.metadata == theirs.metadata, "the range"


def test_every_setting_has_help_and_no_two_share_a_flag() -> None:
    for kind in (LoraConfig, TrainConfig):
        assert all(field.description for field in kind.model_fields.values())
        flags = [flag for name, field in kind.model_fields.items() if (flag := flag_of(name, field))]
        assert len(flags) == len(set(flags))


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("ia3", "r", 8),
        ("ia3", "lora_dropout", 0.0),
        ("ia3", "bias", "all"),
        ("ia3", "lora_plus_ratio", 4.0),
        ("vera", "lora_alpha", 16),
        ("vera", "use_dora", True),
        ("vera", "init_lora_weights", "pissa"),
        ("vera", "trainable_token_indices", [1]),
        ("vera", "target_parameters", ["experts.down_proj"]),
    ],
)
def test_a_method_has_no_setting_of_another(method: str, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name}="):
        TrainConfig(method=method, **{name: value})  # type: ignore[arg-type]
    assert TrainConfig(method=method, exclude_modules=("q_proj",)).peft_type == method.upper()  # type: ignore[arg-type]


def test_the_method_says_what_peft_calls_it() -> None:
    assert TrainConfig(method="vera", peft_type="VERA").peft_type == "VERA"
    assert "peft_type" not in TrainConfig().model_fields_set
    for method, kind in (("lora", "VERA"), ("bitfit", "IA3"), ("vera", "LORA")):
        with pytest.raises(ConfigError, match=f"peft_type='{kind}' contradicts method='{method}'"):
            TrainConfig(method=method, peft_type=kind)  # type: ignore[arg-type]
