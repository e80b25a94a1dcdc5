"""A config of PEFT's: written, read, and not changed."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest

from loratune.compat.peft import LoraConfig
from loratune.errors import ConfigError


def test_it_is_written_as_peft_reads_it(tmp_path: Path) -> None:
    LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path="someone/tiny").save_pretrained(tmp_path / "x")
    theirs = peft.LoraConfig.from_pretrained(tmp_path / "x")
    assert (theirs.r, theirs.lora_alpha, theirs.target_modules) == (4, 8, {"q_proj"})
    assert json.loads((tmp_path / "x" / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/tiny"


def test_setting_a_field_says_what_to_do_instead() -> None:
    config = LoraConfig(r=4)
    with pytest.raises(ConfigError, match="r: a config does not change") as caught:
        config.r = 8
    assert "config.replace(r=...)" in caught.value.hint
    config.base_model_name_or_path = "someone/else"
    assert (config.r, config.base_model_name_or_path) == (4, "someone/else")
