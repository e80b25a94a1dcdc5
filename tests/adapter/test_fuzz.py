"""Every damaged adapter folder is refused by name, or is an adapter whose outputs somebody else computes too.

Whatever the files hold, `attach(model, folder)` and `handle.load(folder, name)` end in one of two ways: a
`LoratuneError` that lists problems, with the model exactly as it was; or a success whose logits are those of an
independent reading of the same files. Nothing else is allowed: no other exception, no half-loaded model, no NaN, no
code run, nothing that takes forever. The damage is listed in the three files of mutations beside this one.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import loratune as lt
from loratune.errors import AdapterFileError
from tests.adapter import config_mutations, tensor_mutations, verdict
from tests.adapter.mutations import (
    CARD,
    CONFIG,
    EITHER,
    Q0A,
    REFUSED,
    SAME,
    TENSORS,
    Mutation,
    edit_config,
    edit_tensors,
    flips,
    strangers,
    truncations,
)
from tests.adapter.verdict import SETTINGS, Attach, base, gap, judge, logits, write_by

ROOMS = (
    *(truncations, flips, strangers),
    *(tensor_mutations.tensors, tensor_mutations.headers),
    *(config_mutations.texts, config_mutations.values),
)
MUTATIONS = tuple(mutation for room in ROOMS for mutation in room())
SOURCES = ("ours", "peft")
CASES = tuple((source, mutation) for mutation in MUTATIONS for source in SOURCES)
SAMPLE_STEP = 43  # odd, so that both sources come up


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {source: tmp_path_factory.mktemp(source) / "good" for source in SOURCES}
    for source, folder in folders.items():
        write_by(source, folder)
        assert {TENSORS, CONFIG, CARD} <= {path.name for path in folder.iterdir()}
    return folders


@pytest.fixture(scope="module")
def expected(good: dict[str, Path]) -> dict[str, Tensor]:
    found = {}
    for source, folder in good.items():
        model = base()
        lt.attach(model, folder)
        found[source] = logits(model)
        assert gap(found[source], logits(base())) > 0.05, "the adapter must matter for any of this to say something"
    return found


def _parameters() -> list[Any]:
    return [
        pytest.param(
            source, mutation, id=f"{source}:{mutation.id}", marks=[pytest.mark.full] if n % SAMPLE_STEP else []
        )
        for n, (source, mutation) in enumerate(CASES)
    ]


@pytest.mark.parametrize(("source", "mutation"), _parameters())
def test_damage(
    tmp_path: Path, good: dict[str, Path], expected: dict[str, Tensor], source: str, mutation: Mutation
) -> None:
    folder = Path(shutil.copytree(good[source], tmp_path / "copy"))
    mutation.change(folder)
    judge(folder, mutation, expected[source])


def test_what_is_tried() -> None:
    assert len(MUTATIONS) >= 300
    names = [mutation.id for mutation in MUTATIONS]
    assert len(set(names)) == len(names)
    sample = CASES[::SAMPLE_STEP]
    assert 30 <= len(sample) <= 60
    assert {source for source, _ in sample} == set(SOURCES)
    assert {mutation.kind for _, mutation in sample} >= {"truncated", "flip", "stranger", "tensor", "header", "config"}
    assert {mutation.expect for _, mutation in sample} == {REFUSED, SAME, EITHER}


# -- the verdict can be guilty -----------------------------------------------------------------------------------------


def lenient(model: nn.Module, folder: Path) -> lt.Adapters:
    """Cuts a tensor that is too large to the shape it should have."""
    edit_tensors(folder, lambda t: t.update({Q0A: t[Q0A][:4].clone()}))
    return lt.attach(model, folder)


def half(model: nn.Module, folder: Path) -> lt.Adapters:
    """Refuses when the first modules have their adapters already."""
    lt.attach(model, lt.LoraConfig(**SETTINGS))
    return lt.attach(base(), folder)


def careless(model: nn.Module, folder: Path) -> lt.Adapters:
    """Lets a library's exception through."""
    load_file(folder / TENSORS)
    return lt.attach(model, folder)


def silent(model: nn.Module, folder: Path) -> lt.Adapters:
    """Refuses without a word."""
    try:
        return lt.attach(model, folder)
    except AdapterFileError:
        raise AdapterFileError([]) from None


def opener(model: nn.Module, folder: Path) -> lt.Adapters:
    """Reads pickles."""
    torch.load(folder / "adapter_model.bin", weights_only=False)
    return lt.attach(model, folder)


def deaf(model: nn.Module, folder: Path) -> lt.Adapters:
    """Takes the settings for what they usually are."""
    edit_config(folder, lambda config: config.update(lora_alpha=SETTINGS["lora_alpha"]))
    handle = lt.attach(model, folder)
    edit_config(folder, lambda config: config.update(lora_alpha=13))
    return handle


def forgetful(model: nn.Module, folder: Path) -> lt.Adapters:
    """Leaves the adapter's outputs not finite."""
    handle = lt.attach(model, folder)
    with torch.no_grad():
        next(iter(model.parameters())).fill_(torch.nan)
    return handle


def strict(model: nn.Module, folder: Path) -> lt.Adapters:
    """Wants a file that nobody needs."""
    if not (folder / CARD).exists():
        raise AdapterFileError("no card")
    return lt.attach(model, folder)


def idle(model: nn.Module, folder: Path) -> lt.Adapters:
    while True:
        pass


PLANTED: dict[str, tuple[Attach, str, str]] = {
    "no check of shapes": (lenient, "tensor/model.layers.0.self_attn.q_proj.lora_A one row more", "it was accepted"),
    "adapters before checks": (half, "tensor/none at all", "are not what they were"),
    "a library's exception": (careless, "truncated/tensors to 9 bytes", "neither a success nor a refusal"),
    "no problem named": (silent, "tensor/none at all", "an error without a problem"),
    "pickles opened": (opener, "stranger/only adapter_model.bin", "a pickle was opened"),
    "alpha not read": (deaf, "config/lora_alpha=13", "another reading of the files differs"),
    "NaN let through": (forgetful, "truncated/card to 0 tenths", "not finite"),
    "good files refused": (strict, "card/is gone", "refused: no card"),
    "an endless read": (idle, "truncated/card to 0 tenths", "TimeoutError"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(
    tmp_path: Path,
    good: dict[str, Path],
    expected: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    attach, name, message = PLANTED[fault]
    mutation = next(mutation for mutation in MUTATIONS if mutation.id == name)
    monkeypatch.setattr(verdict, "SECONDS", 1.0 if attach is idle else verdict.SECONDS)
    folder = Path(shutil.copytree(good["ours"], tmp_path / "copy"))
    mutation.change(folder)
    with pytest.raises(AssertionError, match=message):
        judge(folder, mutation, expected["ours"], attach)
