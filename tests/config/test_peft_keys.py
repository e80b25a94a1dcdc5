"""Every key that peft writes is known here: implemented, descriptive, or neutral and refused at another value."""

from __future__ import annotations

import json
from typing import Any

import peft
import pytest

from loratune.config import LoraConfig
from loratune.config.methods import from_file, settings_of, to_file
from loratune.config.peft_keys import DESCRIPTIVE, FORMAT_VERSION, NEUTRAL
from loratune.errors import ConfigError

THEIRS = dict(peft.LoraConfig().to_dict())


def test_the_three_groups_are_all_keys_of_peft_and_do_not_overlap() -> None:
    groups = [set(settings_of("LORA", LoraConfig.names())), set(NEUTRAL), set(DESCRIPTIVE)]
    assert set.union(*groups) == set(THEIRS)
    assert sum(map(len, groups)) == len(THEIRS)
    assert peft.__version__ == FORMAT_VERSION


@pytest.mark.parametrize(("method", "theirs"), [("VERA", peft.VeraConfig()), ("IA3", peft.IA3Config())])
def test_other_methods_have_pefts_keys_and_defaults(method: str, theirs: Any) -> None:
    ours = to_file(method, LoraConfig(peft_type=method).model_dump())  # type: ignore[arg-type]
    assert {**ours, **dict.fromkeys(DESCRIPTIVE)}.keys() == theirs.to_dict().keys()
    assert ours == {name: value for name, value in theirs.to_dict().items() if name in ours}
    values, others = from_file(theirs.to_dict())
    assert LoraConfig(**values) == LoraConfig(peft_type=method)  # type: ignore[arg-type]
    assert set(others) == set(DESCRIPTIVE)


def test_neutral_is_what_peft_does_by_default() -> None:
    assert {key: THEIRS[key] for key in NEUTRAL} == NEUTRAL


def test_defaults_are_pefts_but_for_alpha() -> None:
    ours = {name: getattr(LoraConfig(), name) for name in settings_of("LORA", LoraConfig.names())}
    assert {name for name in ours if ours[name] != THEIRS[name]} == {"lora_alpha"}
    assert (ours["lora_alpha"], THEIRS["lora_alpha"]) == (16, 8)


def test_a_config_of_peft_is_accepted_whole() -> None:
    theirs = peft.LoraConfig(r=4, lora_alpha=9, target_modules=["b", "a"], task_type="CAUSAL_LM")
    values = json.loads(json.dumps(theirs.to_dict(), default=sorted))
    config = LoraConfig(**values)
    assert (config.r, config.lora_alpha, set(config.target_modules or ())) == (4, 9, {"a", "b"})


@pytest.mark.parametrize("key", sorted(NEUTRAL))
def test_neutral_values_pass_and_others_are_refused_by_name(key: str) -> None:
    empty: tuple[Any, ...] = (None, [], {}, False, NEUTRAL[key])
    for value in empty:
        assert LoraConfig(**{key: value}) == LoraConfig()
    for value in ("something", 17, True, ["lm_head"], {"a": 1}):
        with pytest.raises(ConfigError) as caught:
            LoraConfig(**{key: value})
        assert caught.value.problems == (f"{key}={value!r}: not implemented, only {NEUTRAL[key]!r} is",)


@pytest.mark.parametrize("key", DESCRIPTIVE)
def test_facts_about_a_file_are_no_settings(key: str) -> None:
    assert LoraConfig(**{key: "whatever"}) == LoraConfig()
