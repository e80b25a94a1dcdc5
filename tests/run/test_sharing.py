"""Prefixes that rows share: found, said, used, and never a different result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratune.errors import ConfigError
from tests.models import saved, write_jsonl
from tests.tiny import tiny_tokenizer

Quick = Callable[..., Any]

SYSTEM = "You add two numbers and answer with nothing but the sum, without a word of explanation. " * 2


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [
        {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": f"{n} + {n + 1}"},
                {"role": "assistant", "content": str(2 * n + 1)},
            ]
        }
        for n in range(24)
    ]
    return str(write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", rows))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(saved(tmp_path_factory.mktemp("wide") / "llama", max_position_embeddings=512))


def losses(run: Any) -> list[float]:
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def computed(run: Any) -> int:
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return sum(line.get("computed_tokens", 0) for line in lines)


def test_a_common_system_prompt_is_computed_once(quick: Quick, wide: str, chats: str, tmp_path: Path) -> None:
    plain = {"model": wide, "data": chats, "lora_dropout": 0.0}
    shared, whole = quick(tmp_path / "shared", **plain), quick(tmp_path / "whole", **plain, share_prefixes=False)
    setting = shared.record["settings"]["share_prefixes"]
    assert setting["value"] is True
    assert "begin alike in" in setting["reason"]
    assert computed(shared) < 0.5 * computed(whole)
    assert losses(shared) == pytest.approx(losses(whole), rel=1e-4)
    ends = (run.record["result"]["val_loss"] for run in (shared, whole))
    assert next(ends) == pytest.approx(next(ends), rel=1e-4)


def test_rows_that_begin_differently_are_left_whole(quick: Quick, tmp_path: Path) -> None:
    setting = quick(tmp_path / "run").record["settings"]["share_prefixes"]
    assert setting["value"] is False
    assert "begin alike in" in setting["reason"]


def test_padded_rows_share_nothing(quick: Quick, wide: str, chats: str, tmp_path: Path) -> None:
    run = quick(tmp_path / "run", model=wide, data=chats, pack=False)
    assert run.record["settings"]["share_prefixes"] == {"value": False, "reason": "rows are padded"}
    with pytest.raises(ConfigError, match="share_prefixes: rows are padded"):
        quick(tmp_path / "other", model=wide, data=chats, pack=False, share_prefixes=True)
    assert not (tmp_path / "other").exists()


def test_a_model_whose_branches_deviate(
    quick: Quick, wide: str, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratune.run.setup.why_no_shared_prefixes", lambda _: "rows deviate")
    run = quick(tmp_path / "run", model=wide, data=chats)
    assert run.record["settings"]["share_prefixes"] == {"value": False, "reason": "rows deviate"}
    with pytest.raises(ConfigError, match="this model cannot: rows deviate"):
        quick(tmp_path / "other", model=wide, data=chats, share_prefixes=True)


def test_the_tokenizer_of_these_tests_repeats_the_prompt() -> None:
    """Else the rows would share less than a tenth, and nothing above would be tested."""
    assert len(tiny_tokenizer()(SYSTEM)["input_ids"]) > 60
