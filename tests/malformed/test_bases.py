"""Malformed model folders: refused by name, with nothing of theirs run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from loratune.model import load_base
from loratune.run.look import look_at_data
from tests.malformed.bases import cases
from tests.malformed.cases import REFUSED, Case, Counted, outcome
from tests.models import additions, saved

ROWS = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    for row in additions(12)
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("sound") / "model")


def used(path: Path) -> Any:
    """Its weights loaded, and rows made into tokens by its template: all that a run takes of it."""
    base = load_base(str(path), dtype="fp32", device="cpu")
    look_at_data(str(path), ROWS, val=0)
    return base


def test_the_sound_one_is_taken(sound: Path) -> None:
    assert used(sound).fingerprint


@pytest.mark.parametrize("layers", [1, -1])
def test_weights_without_a_place_are_said(
    layers: int, sound: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A config of fewer layers than the files have, and of none."""
    path = shutil.copytree(sound, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    load_base(str(path), dtype="fp32", device="cpu")
    count = 9 * (2 - max(layers, 0))
    assert f"{count} tensors in its files are no part of the model: model.layers.{max(layers, 0)}." in caplog.text


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_bases(case: Case, sound: Path, tmp_path: Path, counted: Counted) -> None:
    shutil.copytree(sound, tmp_path / "model")
    path = case.make(tmp_path)
    # What is said of a template is said of the rows that it was to make.
    named = outcome if "template" not in case.name else _by_rows
    assert named(case, path, used) is REFUSED
    assert not (tmp_path / "ran").exists(), "code ran"
    counted("malformed input")


def _by_rows(case: Case, path: Path, read: Any) -> Any:
    return outcome(case, path.with_name("rows") if "that" in case.name else path, lambda _: read(path))
