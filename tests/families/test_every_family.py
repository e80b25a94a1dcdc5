"""Every family by its preset and by all-linear: found, trained, saved, read by peft, merged, taken off.

`test_lifecycle.py` has the kinds of adapters on a few families; here is the plain one on all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import loratune as lt
from loratune.adapt.presets import TARGETS
from loratune.errors import TargetError
from tests.adapt.model import bits
from tests.families.zoo import FAMILIES, answer, built, food_of

EVERY = pytest.mark.parametrize("family", list(FAMILIES))
# One of each way in which paths are made; all of them in `make test-full`.
READ_HERE = ("gpt2", "t5", "deberta-v2", "whisper", "clip")
SETTINGS: dict[str, Any] = {"r": 2, "lora_alpha": 4}


def linears(model: nn.Module) -> set[str]:
    """Paths of what is linear, by classes and names of classes alone."""
    return {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }


def kind_of(model: Any) -> str:
    return getattr(model.config, "model_type", None) or type(model).__name__


def state(model: nn.Module, handle: lt.Adapters | None = None) -> dict[str, Any]:
    """All tensors as their bytes, and what each module is."""
    return {
        "tensors": {name: bits(tensor) for name, tensor in model.state_dict().items()},
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)},
        "modules": {path: (id(module), type(module), module.training) for path, module in model.named_modules()},
        "handle": handle and (handle.names, handle.active, handle.merged),
    }


def output(model: Any, family: str) -> Tensor:
    with torch.no_grad():
        return answer(model, food_of(family))


def gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def train(model: Any, family: str, handle: lt.Adapters) -> None:
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.02)
    target = torch.randn(output(model, family).shape, generator=torch.Generator().manual_seed(2))
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        (answer(model, food_of(family)) - target).square().mean().backward()
        optimizer.step()
    model.eval()


@EVERY
def test_targets(family: str) -> None:
    """By the preset those projections that attention begins with, in every layer and tower; by all-linear all of them
    but the head, and no new head."""
    with torch.device("meta"):
        model = built(family)
    plan = lt.plan(model, lt.LoraConfig(**SETTINGS))
    assert plan.problems == ()
    found = {target.path for target in plan.targets}
    queries = FAMILIES[family].queries
    assert TARGETS[kind_of(model)] == queries
    assert found == {path for path in linears(model) if any(path.endswith(f".{name}") for name in queries)}
    assert found, "a family without attention"
    assert plan.notes[0] == f"targets of the {kind_of(model)} preset: {', '.join(queries)}"
    every = lt.plan(model, lt.LoraConfig(r=1, target_modules="all-linear"))
    assert every.problems == ()
    assert {target.path for target in every.targets} == linears(model) - FAMILIES[family].left


@EVERY
def test_from_attach_to_detach(family: str, tmp_path: Path) -> None:
    model = built(family)
    before, start = state(model), output(model, family)
    base = {name: bits(parameter) for name, parameter in model.named_parameters()}

    handle = lt.attach(model, lt.LoraConfig(**SETTINGS))
    assert torch.equal(output(model, family), start)
    train(model, family, handle)
    trained = output(model, family)
    assert gap(trained, start) > 1e-3
    moved = [float(low_rank.B.abs().max()) for low_rank in handle.factors().values()]
    assert min(moved) > 0
    with handle.disabled():
        assert torch.equal(output(model, family), start)
    assert {name: bits(parameter) for name, parameter in model.named_parameters() if name in base} == base

    handle.save(tmp_path)
    other = built(family)
    lt.attach(other, tmp_path)
    assert torch.equal(output(other, family), trained)
    assert gap(output(peft.PeftModel.from_pretrained(built(family), tmp_path).eval(), family), trained) < 1e-5

    attached = state(model, handle)
    handle.merge()
    assert gap(output(model, family), trained) < 1e-4
    handle.unmerge()
    assert state(model, handle) == attached
    handle.detach()
    assert state(model) == before


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family in READ_HERE else pytest.mark.full) for family in FAMILIES]
)
def test_reads_what_peft_trained(family: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        built(family),
        peft.LoraConfig(**SETTINGS, target_modules=list(FAMILIES[family].queries), init_lora_weights=False),
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = built(family)
    lt.attach(ours, tmp_path)
    assert gap(output(ours, family), output(theirs, family)) < 1e-5
    assert gap(output(ours, family), output(built(family), family)) > 1e-3


def test_every_preset_is_tried() -> None:
    assert {kind_of(built(family)) for family in FAMILIES} == set(TARGETS)


class Unheard(nn.Module):
    """A family that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.gate = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mixer(x) * self.gate(x).sigmoid()
        return y


def test_an_unknown_family() -> None:
    with pytest.raises(TargetError, match="no preset of targets for Unheard: name target_modules") as caught:
        lt.attach(Unheard(), lt.LoraConfig())
    assert caught.value.hint == "linear modules of this model: mixer, gate"
    handle = lt.attach(Unheard(), lt.LoraConfig(target_modules="all-linear"))
    assert list(handle.factors()) == ["mixer", "gate"]


def test_a_new_head_for_images_is_pointed_at() -> None:
    config = lt.LoraConfig(target_modules="all-linear")
    note = "classifier: left as it is; if it is new, modules_to_save trains it whole"
    assert note in lt.plan(built("vit"), config).notes
    plan = lt.plan(built("vit"), config.replace(modules_to_save=["classifier"]))
    assert note not in plan.notes
    assert plan.saved == ("classifier",)


@pytest.mark.parametrize(
    ("family", "task"),
    [("t5", "SEQ_2_SEQ_LM"), ("bart", "SEQ_2_SEQ_LM"), ("whisper", None), ("vit", None), ("bert", "SEQ_CLS")],
)
def test_task_of_a_family(family: str, task: str | None) -> None:
    """peft's wrapper for sequence to sequence hands `input_ids` on, of which Whisper has none."""
    assert lt.attach(built(family), lt.LoraConfig()).config().task_type == task
