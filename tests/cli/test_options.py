"""Options come from the settings' definitions: every setting has its flag, and files, `--set` and flags meet."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratune.cli.options import parse_given
from loratune.config import TrainConfig, flag_of, read_settings
from loratune.errors import ConfigError
from tests.cli.conftest import Cli

Chosen = Callable[..., dict[str, Any]]


@pytest.fixture
def chosen(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Chosen:
    """The settings with which `loratune train` would run."""
    given: dict[str, Any] = {}

    class Stop(Exception):
        pass

    def take(model: str, data: str, *, listen: Any, **settings: Any) -> None:
        given.clear()
        given.update(TrainConfig(**settings).model_dump(include=set(TrainConfig(**settings).model_fields_set)))
        raise Stop

    import loratune.run

    monkeypatch.setattr(loratune.run, "train", take)

    def run(*words: object) -> dict[str, Any]:
        said = cli("train", "model", "data", *words)
        assert "internal error: Stop" in said.err, said.err
        return dict(given)

    return run


# -- flags -------------------------------------------------------------------------------------------------------


def test_every_setting_has_a_flag_in_the_help(cli: Cli) -> None:
    text = cli("train", "--help").out
    flags = set(re.findall(r"--[a-z][a-z-]*", text))
    settings = {flag_of(name, field) for name, field in TrainConfig.model_fields.items()}
    assert None not in settings
    assert settings <= flags
    assert {"--no-pack", "--no-rslora", "--config", "--set", "--json", "--dry-run"} <= flags
    # … and no flag that stands for nothing.
    own = {"--config", "--set", "--json", "--dry-run", "--help"}
    assert {flag for flag in flags - settings - own if not flag.startswith("--no-")} == set()


def test_help_says_what_a_setting_means(cli: Cli) -> None:
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", cli("train", "--help").out).split())
    for name, field in TrainConfig.model_fields.items():
        words = str(field.description).split()
        assert " ".join(words[:4]) in text, name


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (("--rank", "32"), "r", 32),
        (("--alpha", "12"), "lora_alpha", 12),
        (("--dropout", "0.1"), "lora_dropout", 0.1),
        (("--targets", "q_proj,v_proj"), "target_modules", ("q_proj", "v_proj")),
        (("--targets", "all-linear"), "target_modules", "all-linear"),
        (("--targets", r".*\.(up|down)_proj"), "target_modules", r".*\.(up|down)_proj"),
        (("--exclude", "layers.0.mlp.up_proj"), "exclude_modules", ("layers.0.mlp.up_proj",)),
        (("--layers", "0,2,5-7"), "layers_to_transform", (0, 2, 5, 6, 7)),
        (("--train-tokens", "3,400-402"), "trainable_token_indices", (3, 400, 401, 402)),
        (("--init", "gaussian"), "init_lora_weights", "gaussian"),
        (("--init", "false"), "init_lora_weights", False),
        (("--val", "0.1"), "val", 0.1),
        (("--val", "50"), "val", 50),
        (("--val", "held-out.jsonl"), "val", "held-out.jsonl"),
        (("--warmup", "10"), "warmup", 10),
        (("--warmup", "0.1"), "warmup", 0.1),
        (
            ("--columns", "prompt=question, completion=answer"),
            "columns",
            {"prompt": "question", "completion": "answer"},
        ),
        (("--log-with", "wandb,mlflow"), "log_with", ("wandb", "mlflow")),
        (("--no-pack",), "pack", False),
        (("--pack",), "pack", True),
        (("--group-prefixes",), "group_prefixes", True),
        (("--no-group-prefixes",), "group_prefixes", False),
        (("--rslora",), "use_rslora", True),
        (("--epochs", "2"), "epochs", 2.0),
        (("--lr", "1e-3"), "lr", 1e-3),
        (("--seed", "7"), "seed", 7),
        (("--micro-batch-tokens", "512"), "micro_batch_tokens", 512),
        (("--early-stop", "3"), "early_stop", 3),
        (("--recompute", "on"), "recompute", "on"),
    ],
)
def test_flag(words: tuple[str, ...], name: str, value: Any, chosen: Chosen) -> None:
    assert chosen(*words) == {name: value}


def test_nothing_given_is_nothing_chosen(chosen: Chosen) -> None:
    assert chosen() == {}


def test_words_that_cannot_be_read() -> None:
    for flags in ({"layers_to_transform": "1-"}, {"columns": "a"}, {"columns": "a=,b=c"}):
        with pytest.raises(ConfigError):
            parse_given(flags)
        for name, value in flags.items():
            with pytest.raises(ConfigError):
                read_settings(None, [f"{name}={value}"], {})


# -- files, --set, flags -----------------------------------------------------------------------------------------

TOML = """
rank = 8
lr = 1e-3
targets = ["q_proj", "v_proj"]
val = 0.2
columns = {prompt = "question"}
"""
YAML = """
rank: 8
lr: 1e-3
targets: [q_proj, v_proj]
val: 0.2
columns: {prompt: question}
"""
BOTH = {
    "r": 8,
    "lr": 1e-3,
    "target_modules": ("q_proj", "v_proj"),
    "val": 0.2,
    "columns": {"prompt": "question"},
}


@pytest.fixture(params=[("settings.toml", TOML), ("settings.yaml", YAML), ("settings.yml", YAML)])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    name, text = request.param
    (tmp_path / name).write_text(text)
    return tmp_path / str(name)


def test_file(file: Path, chosen: Chosen) -> None:
    assert chosen("--config", file) == BOTH


def test_set_wins_over_the_file_and_flags_win_over_both(file: Path, chosen: Chosen) -> None:
    assert chosen("--config", file, "--set", "lr=2e-3", "--set", "max-steps=5") == {**BOTH, "lr": 2e-3, "max_steps": 5}
    assert chosen("--config", file, "--set", "lr=2e-3", "--lr", "3e-3") == {**BOTH, "lr": 3e-3}


def test_one_setting_under_two_names(file: Path, chosen: Chosen) -> None:
    """The file says `rank`, the flag's parameter is `r`, a user of PEFT writes `r`: one setting, the flag wins."""
    assert chosen("--config", file, "--rank", 2) == {**BOTH, "r": 2}
    assert chosen("--config", file, "--set", "r=3") == {**BOTH, "r": 3}
    assert chosen("--set", "lora_alpha=4", "--alpha", "5") == {"lora_alpha": 5}


@pytest.mark.parametrize(
    ("word", "name", "value"),
    [
        ("pack=false", "pack", False),
        ("seed=3", "seed", 3),
        ("schedule=linear", "schedule", "linear"),
        ('schedule="linear"', "schedule", "linear"),
        ('targets=["q_proj", "v_proj"]', "target_modules", ("q_proj", "v_proj")),
        ("targets=all-linear", "target_modules", "all-linear"),
        ('columns={"prompt": "question"}', "columns", {"prompt": "question"}),
        ("val=held-out.jsonl", "val", "held-out.jsonl"),
        ("targets=q_proj,v_proj", "target_modules", ("q_proj", "v_proj")),
        ("targets=q_proj", "target_modules", ("q_proj",)),
        ("targets=none", "target_modules", "dummy-target-modules"),
        (r"targets=.*\.(up|down)_proj", "target_modules", r".*\.(up|down)_proj"),
        (r"target_modules='.*_proj'", "target_modules", ".*_proj"),
        ("exclude=up_proj,down_proj", "exclude_modules", ("up_proj", "down_proj")),
        ("layers=0,2,5-7", "layers_to_transform", (0, 2, 5, 6, 7)),
        ("layers=3", "layers_to_transform", (3,)),
        ("layers=[3]", "layers_to_transform", (3,)),
        ("columns=prompt=question,completion=answer", "columns", {"prompt": "question", "completion": "answer"}),
        ("log-with=wandb,mlflow", "log_with", ("wandb", "mlflow")),
        ("init=False", "init_lora_weights", False),
        ("init=false", "init_lora_weights", False),
        ("val=50", "val", 50),
        ("warmup=1e-2", "warmup", 0.01),
        ("recompute=on", "recompute", "on"),
    ],
)
def test_set(word: str, name: str, value: Any, chosen: Chosen) -> None:
    assert chosen("--set", word) == {name: value}


@pytest.mark.parametrize(
    ("text", "name"),
    [("epoch = 3\n", "settings.toml"), ("epoch: 3\n", "settings.yaml")],
)
def test_unknown_key_in_a_file(text: str, name: str, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    said = cli("train", "model", "data", "--config", tmp_path / name)
    assert said.code == 2
    assert "unknown setting 'epoch'; did you mean 'epochs'?" in said.err


def test_all_problems_at_once(cli: Cli) -> None:
    said = cli("train", "model", "data", "--set", "epoch=3", "--set", "lr=-1", "--set", "batch_size=many", "--json")
    assert said.code == 2
    problems = said.json["error"]["problems"]
    assert len(problems) == 3
    assert any("'epochs'" in problem for problem in problems)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", "rank = "),
        ("a.yaml", "a: [1"),
        ("a.yaml", "- 1\n"),
        ("a.json", "{}"),
        ("a.toml", None),
    ],
)
def test_bad_file(name: str, text: str | None, cli: Cli, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    said = cli("train", "model", "data", "--config", tmp_path / name)
    assert said.code == 2
    assert name in said.err


def test_word_without_a_value(cli: Cli) -> None:
    said = cli("train", "model", "data", "--set", "lr")
    assert said.code == 2
    assert "name=value" in said.err


def test_method_and_its_contradiction(chosen: Chosen, cli: Cli) -> None:
    assert chosen("--method", "rslora") == {"method": "rslora", "use_rslora": True}
    said = cli("train", "model", "data", "--method", "rslora", "--no-rslora")
    assert said.code == 2
    assert "use_rslora=False contradicts method='rslora'" in said.err


@pytest.mark.parametrize("default", ["full", "auto", "assistant", "error", "all-linear", "cosine", "adamw"])
def test_help_says_word_defaults(default: str, cli: Cli) -> None:
    """Square brackets would be read as markup and vanish."""
    assert f"(default {default})" in re.sub(r"[\s│]+", " ", cli("train", "--help").out)


def test_mistyped_dtype_of_a_merge_is_refused(cli: Cli, tmp_path: Path) -> None:
    said = cli("merge", "run", "--out", str(tmp_path / "out"), "--dtype", "bff16")
    assert said.code == 2
    assert "bff16" in said.err
