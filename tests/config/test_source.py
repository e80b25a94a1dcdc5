"""Settings from files, `name=value` words and flags, and which of them wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loratune.config import NO_TARGETS, LoraConfig, TrainConfig, read_settings
from loratune.errors import ConfigError

TOML = """
r = 16
lr = 1e-3
targets = ["q_proj", "v_proj"]
layers = [0, 1]
pack = true
columns = {prompt = "question"}
recompute = "on"
out = "runs/a"
"""

YAML = """
r: 16
lr: 1e-3
targets: [q_proj, v_proj]
layers: [0, 1]
pack: true
columns:
  prompt: question
recompute: on
out: runs/a
"""


def written(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize(("name", "text"), [("a.toml", TOML), ("a.yaml", YAML), ("a.yml", "\ufeff" + YAML)])
def test_both_formats_mean_the_same(tmp_path: Path, name: str, text: str) -> None:
    settings = read_settings(written(tmp_path, name, text), [], {})
    assert settings == {
        "r": 16,
        "lr": 0.001,
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [0, 1],
        "pack": True,
        "columns": {"prompt": "question"},
        "recompute": "on",
        "out": "runs/a",
    }
    config = TrainConfig(**settings)
    assert config.target_modules == ("q_proj", "v_proj")
    assert config.lr == 1e-3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("1e-3", 0.001),
        ("+2E5", 200_000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("1.5e+3", 1500.0),
        ("-0.25", -0.25),
        ("off", "off"),
        ("no", "no"),
        ("true", True),
        ("False", False),
        ("'1e-3'", "1e-3"),
        ("1e-3x", "1e-3x"),
        ("truest", "truest"),
        ("null", None),
    ],
)
def test_yaml_scalars(tmp_path: Path, text: str, value: Any) -> None:
    read = read_settings(written(tmp_path, "a.yaml", f"x: {text}\n"), [], {})["x"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("r=16", {"r": 16}),
        ("rank=16", {"r": 16}),
        ("batch-size = 4", {"batch_size": 4}),
        ("lr=1e-4", {"lr": 0.0001}),
        ("pack=false", {"pack": False}),
        ("out=runs/a=b", {"out": "runs/a=b"}),
        ("schedule=linear", {"schedule": "linear"}),
        ('schedule="linear"', {"schedule": "linear"}),
        ("target_modules=['q','v']", {"target_modules": ["q", "v"]}),
        ('columns={"prompt": "q"}', {"columns": {"prompt": "q"}}),
        ("device=null", {"device": None}),
    ],
)
def test_words(word: str, expected: dict[str, Any]) -> None:
    assert read_settings(None, [word], {}) == expected


@pytest.mark.parametrize("word", ["r", "=3", "  =3", ""])
def test_words_without_a_name_or_value(word: str) -> None:
    with pytest.raises(ConfigError, match="write name=value"):
        read_settings(None, [word], {})


@pytest.mark.parametrize("in_file", ["r", "rank"])
@pytest.mark.parametrize("in_word", ["r", "rank"])
def test_flags_win_over_words_and_words_over_the_file_whatever_name_they_use(
    tmp_path: Path, in_file: str, in_word: str
) -> None:
    file = written(tmp_path, "a.toml", f"{in_file} = 1\nseed = 1\nkeep = 1\n")
    settings = read_settings(file, [f"{in_word}=2", "seed=2"], {"r": 3, "lr": None})
    assert settings == {"r": 3, "seed": 2, "keep": 1}
    assert read_settings(file, [f"{in_word}=2"], {})["r"] == 2


def test_a_source_that_contradicts_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rank=2 contradicts r=1"):
        read_settings(written(tmp_path, "a.toml", "r = 1\nrank = 2\n"), [], {})
    with pytest.raises(ConfigError, match="alpha=2 contradicts lora_alpha=1"):
        read_settings(None, ["lora_alpha=1", "alpha=2"], {})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "r = = 3", "a.toml"),
        ("a.yaml", "r: [1", "a.yaml"),
        ("a.yaml", "- r\n- 3\n", "settings are written as name: value"),
        ("a.yaml", "3: 4\n", "settings are written as name: value"),
        ("a.yaml", "lr: !!int abc", "a.yaml"),
        ("a.yaml", "lr: !!bool x", "a.yaml"),
        ("a.yaml", "lr: !!timestamp abc", "a.yaml"),
        ("a.yaml", f"lr: {'1' * 5000}", "a.yaml"),
        ("a.toml", f"lr = {'1' * 5000}", "a.toml"),
        ("a.json", "{}", "ends in .toml, .yaml or .yml"),
        ("a.yaml", "x: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(written(tmp_path, name, text), [], {})


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings(str(tmp_path / "missing.toml"), [], {})
    (tmp_path / "latin.toml").write_bytes(b'out = "\xe4"')
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings(str(tmp_path / "latin.toml"), [], {})


@pytest.mark.parametrize("name", ["a.toml", "a.yaml"])
def test_an_empty_file_sets_nothing(tmp_path: Path, name: str) -> None:
    assert read_settings(written(tmp_path, name, "# nothing yet\n"), [], {}) == {}


def test_targets_may_be_none_beside_parameters() -> None:
    words = ["targets=none", "target_parameters=experts.gate_up_proj, experts.down_proj"]
    found = TrainConfig(**read_settings(None, words, {}))
    assert found.target_modules == NO_TARGETS
    assert found.target_parameters == ("experts.gate_up_proj", "experts.down_proj")
    assert TrainConfig(**read_settings(None, ["exclude=none"], {})).exclude_modules == ("none",)
    assert LoraConfig(target_modules=[], target_parameters=["w"]).target_modules == NO_TARGETS
    with pytest.raises(ConfigError, match="target_parameters='experts': is a list of names, not one word"):
        LoraConfig(target_parameters="experts")
    with pytest.raises(
        ConfigError, match=r"target_parameters=.* is for low-rank adapters, and method='bitfit' has none"
    ):
        TrainConfig(method="bitfit", target_parameters=["w"])
