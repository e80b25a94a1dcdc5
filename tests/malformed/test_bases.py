"""Malformed model folders: refused by name, with nothing of theirs run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file
from transformers import LlamaForCausalLM

from loratune.errors import ModelError
from loratune.model import Head, load_base
from loratune.run.look import look_at_data
from tests.malformed.bases import CONFIG, TENSORS, cases
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


def test_weights_without_a_place_are_said(sound: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another head, say; the model itself is whole."""
    path = shutil.copytree(sound, tmp_path / "model")
    tensors = load((path / TENSORS).read_bytes())
    save_file(tensors | {"value_head.weight": torch.ones(1, 32)}, path / TENSORS, metadata={"format": "pt"})
    load_base(str(path), dtype="fp32", device="cpu")
    assert "1 tensors in its files are no part of the model: value_head.weight" in caplog.text


@pytest.mark.parametrize("layers", [1, 0, -1])
@pytest.mark.parametrize("head", [Head(), Head("FEATURE_EXTRACTION"), Head("SEQ_CLS", ("a", "b"))], ids=str)
def test_fewer_layers_than_the_files_have(layers: int, head: Head, sound: Path, tmp_path: Path) -> None:
    """Without the last ones it would be a model that nobody trained."""
    path = shutil.copytree(sound, tmp_path / "model")
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, "num_hidden_layers": layers, "pad_token_id": 0}))
    with pytest.raises(ModelError) as caught:
        load_base(str(path), dtype="fp32", device="cpu", head=head)
    said = f"layers has 2 layers in its files, {max(layers, 0)} by its config (num_hidden_layers: {layers})"
    assert said in str(caught.value)


def test_layers_that_a_family_leaves_out_are_left_out(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DeepSeek-V3 does with the layer that predicts a second token."""
    path = shutil.copytree(sound, tmp_path / "model")
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, "num_hidden_layers": 1}))
    ignored = [r"model\.layers\.1.*"]
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", ignored)
    assert load_base(str(path), dtype="fp32", device="cpu").fingerprint


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
