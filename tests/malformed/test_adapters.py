"""Malformed adapter folders: refused with what is wrong, and the model stays what it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import loratune as lt
from tests.malformed.adapters import cases
from tests.malformed.cases import REFUSED, Case, Counted, outcome
from tests.models import tiny

IDS = torch.arange(3, 20)[None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "adapter"
    config = lt.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    lt.attach(tiny(), config).save(folder)
    return folder


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


def test_the_sound_one_is_taken(sound: Path, model: Any) -> None:
    bare = model(IDS).logits
    lora = lt.attach(model, sound)
    assert not torch.equal(model(IDS).logits, bare)
    lora.detach()


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_adapters(case: Case, sound: Path, model: Any, tmp_path: Path, counted: Counted) -> None:
    shutil.copytree(sound, tmp_path / "adapter")
    path = case.make(tmp_path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]

    def read(path: Path) -> Any:
        lora = lt.attach(model, path)
        try:
            return model(IDS).logits
        finally:
            lora.detach()

    found = outcome(case, path, read)
    assert found is REFUSED, "it was taken"
    assert [type(module) for module in model.modules()] == kinds
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    counted("malformed input")
