"""Rows that begin alike meet in a step: where it is worth it, said with figures, refused where it cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratune.errors import ConfigError, RunFolderError, RunInterrupted
from loratune.run.events import Said
from tests.models import saved, write_jsonl
from tests.run.test_resume import adapter_bytes, losses_of, steps_of, stop_at
from tests.run.test_sharing import computed

Quick = Callable[..., Any]

WORDS = "The quick brown fox jumps over the lazy dog while a helpful assistant answers each question and then stops."
PLAIN = {"lora_dropout": 0.0, "samples": 0, "checks": "off", "val": 0}


def chat(document: int, question: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "system", "content": f"{document} {WORDS}"},
            {"role": "user", "content": f"{question} + {question + 1}"},
            {"role": "assistant", "content": str(2 * question + 1)},
        ]
    }


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve documents, four questions about each, far apart from each other."""
    rows = [chat(document, question) for question in range(4) for document in range(12)]
    return str(write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", rows))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(saved(tmp_path_factory.mktemp("wide") / "llama", max_position_embeddings=512))


def test_rows_about_one_document_meet(quick: Quick, wide: str, chats: str, tmp_path: Path) -> None:
    plain = {**PLAIN, "model": wide, "data": chats}
    heard: list[Any] = []
    grouped = quick(tmp_path / "grouped", listen=heard.append, **plain)
    mixed = quick(tmp_path / "mixed", **plain, group_prefixes=False)
    settings = grouped.record["settings"]
    assert settings["group_prefixes"]["value"] is True
    assert settings["share_prefixes"]["value"] is True
    assert mixed.record["settings"]["group_prefixes"] == {"value": False, "reason": "given"}
    assert computed(grouped) < 0.6 * computed(mixed)
    plan = next(event.text for event in heard if isinstance(event, Said) and event.topic == "plan")
    found = settings["group_prefixes"]["reason"]
    shares = [int(word.rstrip("%")) for word in found.split() if word.endswith("%")]
    assert f"shared prefixes save {shares[0]}% of the tokens, {shares[1]}% without groups" in plan
    assert shares[0] > shares[1] + 30


def test_the_figures_are_those_of_the_steps(quick: Quick, wide: str, chats: str, tmp_path: Path) -> None:
    """One epoch of six steps, all of which are looked at."""
    plain = {**PLAIN, "model": wide, "data": chats}
    for name, more in (("grouped", {}), ("mixed", {"group_prefixes": False, "share_prefixes": True})):
        run = quick(tmp_path / name, **plain, **more)
        whole = quick(tmp_path / f"{name} whole", **plain, **more | {"group_prefixes": False, "share_prefixes": False})
        share = 1 - computed(run) / computed(whole)
        if name == "grouped":
            assert f"begin alike in {share:.0%} of their tokens" in run.record["settings"]["group_prefixes"]["reason"]
        else:
            reason = quick(tmp_path / "again", **plain).record["settings"]["group_prefixes"]["reason"]
            assert f"{share:.0%} in random order" in reason


def test_where_all_rows_begin_alike_they_meet_at_random(quick: Quick, wide: str, tmp_path: Path) -> None:
    data = str(write_jsonl(tmp_path / "chats.jsonl", [chat(7, question) for question in range(24)]))
    run = quick(tmp_path / "run", **PLAIN, model=wide, data=data)
    assert run.record["settings"]["share_prefixes"]["value"] is True
    setting = run.record["settings"]["group_prefixes"]
    assert setting["value"] is False
    assert "in random order" in setting["reason"]
    forced = quick(tmp_path / "forced", **PLAIN, model=wide, data=data, group_prefixes=True)
    assert forced.record["settings"]["group_prefixes"] == {"value": True, "reason": "given"}


def test_rows_that_share_nothing(quick: Quick, tmp_path: Path) -> None:
    """Asked for, prefixes are shared and rows grouped; else neither."""
    setting = quick(tmp_path / "run").record["settings"]["group_prefixes"]
    assert setting == {"value": False, "reason": "prefixes are not shared"}
    forced = quick(tmp_path / "forced", group_prefixes=True).record["settings"]
    assert forced["share_prefixes"]["value"] is True
    assert forced["group_prefixes"] == {"value": True, "reason": "given"}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_small_steps(batch_size: int, quick: Quick, wide: str, chats: str, tmp_path: Path) -> None:
    plain = {**PLAIN, "model": wide, "data": chats, "batch_size": batch_size}
    setting = quick(tmp_path / "run", **plain).record["settings"]["group_prefixes"]
    assert setting["value"] is False
    with pytest.raises(ConfigError, match=f"a step of {batch_size} rows has no room for several groups"):
        quick(tmp_path / "other", **plain, group_prefixes=True)
    assert not (tmp_path / "other").exists()


def test_contradictions_are_refused(
    quick: Quick, wide: str, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {**PLAIN, "model": wide, "data": chats, "group_prefixes": True}
    with pytest.raises(ConfigError, match="group_prefixes=True contradicts share_prefixes=False"):
        quick(tmp_path / "run", **plain, share_prefixes=False)
    with pytest.raises(ConfigError, match="group_prefixes: rows are padded"):
        quick(tmp_path / "run", **plain, pack=False)
    monkeypatch.setattr("loratune.run.setup.why_no_shared_prefixes", lambda _: "rows deviate")
    with pytest.raises(ConfigError, match="group_prefixes: this model cannot: rows deviate") as caught:
        quick(tmp_path / "run", **plain)
    assert "leave --group-prefixes out" in str(caught.value)
    assert not (tmp_path / "run").exists()
    run = quick(tmp_path / "run", **{**plain, "group_prefixes": None})
    for name in ("share_prefixes", "group_prefixes"):
        assert run.record["settings"][name] == {"value": False, "reason": "rows deviate"}


def test_without_sharing_there_are_no_groups(quick: Quick, wide: str, chats: str, tmp_path: Path) -> None:
    plain = {**PLAIN, "model": wide, "data": chats}
    run = quick(tmp_path / "run", **plain, share_prefixes=False)
    assert run.record["settings"]["group_prefixes"] == {"value": False, "reason": "prefixes are not shared"}
    run = quick(tmp_path / "padded", **plain, pack=False)
    assert run.record["settings"]["group_prefixes"] == {"value": False, "reason": "rows are padded"}


def test_resumed_in_the_second_epoch(quick: Quick, wide: str, chats: str, tmp_path: Path) -> None:
    """Bit by bit, with dropout, in a step that does not fit one micro-batch."""
    plain = {**PLAIN, "model": wide, "data": chats, "lora_dropout": 0.1, "max_steps": 9, "micro_batch_tokens": 300}
    whole = quick(tmp_path / "whole", **plain)
    assert whole.record["settings"]["group_prefixes"]["value"] is True
    for step in (2, 7):
        with pytest.raises(RunInterrupted):
            quick(tmp_path / "cut", listen=stop_at(step), **plain)
    cut = quick(tmp_path / "cut", **plain)
    assert adapter_bytes(cut.path) == adapter_bytes(whole.path)
    assert losses_of(cut.path) == losses_of(whole.path)
    assert steps_of(cut.path) == list(range(1, 10))


def test_another_order_is_another_run(quick: Quick, wide: str, chats: str, tmp_path: Path) -> None:
    plain = {**PLAIN, "model": wide, "data": chats}
    with pytest.raises(RunInterrupted):
        quick(tmp_path / "run", listen=stop_at(2), **plain)
    with pytest.raises(RunFolderError, match="group_prefixes: True there, False now"):
        quick(tmp_path / "run", **plain, group_prefixes=False)


def test_every_row_is_seen_once_an_epoch(quick: Quick, wide: str, chats: str, tmp_path: Path) -> None:
    """Of the same rows the same tokens are supervised in each epoch."""
    run = quick(tmp_path / "run", **PLAIN, model=wide, data=chats, max_steps=12)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert sum(line["examples"] for line in steps[:6]) == 48
    assert sum(line["tokens"] for line in steps[:6]) == sum(line["tokens"] for line in steps[6:])
