"""Malformed rows and files: each is read right, or refused with file and row; nothing else ever reaches the user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loratune.run.look import look_at_data
from tests.malformed import data_files, data_rows
from tests.malformed.cases import Case, Counted, outcome
from tests.models import tiny
from tests.tiny import tiny_tokenizer

CASES = [*data_rows.cases(), *data_files.cases()]


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    return tiny_tokenizer(), tiny(max_position_embeddings=2048)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_data(
    case: Case, parts: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    tokenizer, model = parts
    monkeypatch.setattr("loratune.run.look.load_tokenizer", lambda _: tokenizer)
    monkeypatch.setattr("loratune.run.look.empty_model", lambda *_: model)
    monkeypatch.setattr("loratune.run.task.config_of", lambda _: model.config)
    path = case.make(tmp_path)
    found = outcome(case, path, lambda data: look_at_data("model", str(data), val=0)["rows"])
    assert found == case.result
    counted("malformed input")
