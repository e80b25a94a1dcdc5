"""Every self-check passes on a sound run and catches a planted fault."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune.adapt import Adapters
from loratune.adapter import Factors, SavedAdapter
from loratune.data.pack import Layout, batches
from loratune.errors import AdapterFileError, AdapterStateError, CheckError
from loratune.lora import LowRank
from loratune.model import fingerprint
from loratune.training import checks
from tests.models import EOS, PAD, rows_of
from tests.training.loops import Training, assert_same

ROWS = rows_of(9, 14, 6, 11, 20, 8, 5, 17)
UP = "model.layers.1.mlp.up_proj"


class Case:
    """An adapter before or after training, and what the base computed before it was adapted."""

    def __init__(self, *, trained: bool = True, **settings: Any) -> None:
        self.training = Training(ROWS, **settings)
        self.model, self.lora = self.training.model, self.training.lora
        (self.batch,) = batches(ROWS[:4], self.training.layout, limit=2048, pad_id=PAD)
        with self.lora.disabled():
            self.base_logits = checks.eval_logits(self.model, self.batch)
        self.start = {path: low_rank.B.detach().clone() for path, low_rank in self.lora.factors().items()}
        self.fingerprint = self.now()
        if trained:
            self.training.run()

    def now(self) -> str:
        return fingerprint((name, p) for name, p in self.model.named_parameters() if ".lora." not in name)

    @property
    def factors(self) -> dict[str, LowRank]:
        return self.lora.factors()

    def off(self) -> checks.Check:
        return checks.off_is_base(self.model, self.lora, self.batch, self.base_logits, self.fingerprint, self.now())

    def merged(self) -> checks.Check:
        return checks.merged_is_adapter(self.model, self.lora, self.batch)

    def reload(self) -> checks.Check:
        return checks.reload_is_live(self.model, self.lora, self.batch)


# -- sound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "layout"), [("llama", "packed"), ("llama", "padded"), ("gpt2", "packed"), ("gemma2", "padded")]
)
def test_sound_run_passes_everything(family: str, layout: str) -> None:
    case = Case(trained=False, family=family, layout=Layout(layout))
    found = [
        checks.step0_is_base(case.model, case.batch, case.base_logits),
        checks.gradients_only_in_adapter(case.model, case.lora, case.batch),
        checks.one_batch_overfits(case.model, case.lora, case.batch, 1e-2),
    ]
    case.training.run()
    found += [checks.every_update_moved(case.lora, case.start), checks.all_finite(case.lora)]
    found += [case.reload(), case.merged(), case.off()]
    checks.require(found)
    assert [check for check in found if not check.passed] == []
    assert [check.when for check in found] == ["before"] * 3 + ["after"] * 5
    assert len({check.name for check in found}) == 8


def test_checks_leave_the_adapter_as_it_was() -> None:
    case = Case(dropout=0.2)
    case.model.train()
    before = case.training.weights()
    checks.gradients_only_in_adapter(case.model, case.lora, case.batch)
    checks.one_batch_overfits(case.model, case.lora, case.batch, 1e-2)
    case.reload(), case.merged(), case.off()
    assert_same(case.training.weights(), before)
    assert (case.lora.names, case.lora.active, case.lora.merged) == (("default",), ("default",), False)
    assert all(parameter.grad is None for parameter in case.model.parameters())
    assert case.model.training


def test_require_names_every_failure() -> None:
    good = checks.Check("a", "before", True, "fine")
    bad = [checks.Check(name, "after", False, f"{name} is wrong") for name in ("b", "c")]
    checks.require([good])
    with pytest.raises(CheckError) as caught:
        checks.require([good, *bad])
    assert caught.value.problems == ("b: b is wrong", "c: c is wrong")


# -- planted -----------------------------------------------------------------------------------------------------


def test_step0_deviation() -> None:
    case = Case(trained=False)
    case.factors[UP].B.data[0, 0] = 1e-3
    check = checks.step0_is_base(case.model, case.batch, case.base_logits)
    assert not check.passed
    assert "largest deviation" in check.detail


def test_gradient_in_a_base_weight() -> None:
    case = Case(trained=False)
    case.model.model.norm.weight.requires_grad_(True)
    check = checks.gradients_only_in_adapter(case.model, case.lora, case.batch)
    assert not check.passed
    assert "gradients also in model.norm.weight" in check.detail


@pytest.mark.parametrize("tensor", ["A", "B"])
def test_frozen_factor(tensor: str) -> None:
    case = Case(trained=False)
    getattr(case.factors[UP], tensor).requires_grad_(False)
    check = checks.gradients_only_in_adapter(case.model, case.lora, case.batch)
    assert not check.passed
    assert UP in check.detail


def test_adapter_that_is_never_called() -> None:
    case = Case(trained=False)
    module = case.model.get_submodule(UP)
    module.forward = lambda x: torch.nn.functional.linear(x, module.weight)
    check = checks.gradients_only_in_adapter(case.model, case.lora, case.batch)
    assert not check.passed
    assert "no gradient reaches " + UP in check.detail


def test_missing_end_of_turn() -> None:
    ended = [replace(row, ids=(*row.ids[:-1], EOS)) for row in ROWS]
    assert checks.end_of_turn_supervised(ended, frozenset({EOS})).passed
    ended[3] = ROWS[3]
    check = checks.end_of_turn_supervised(ended, frozenset({EOS}))
    assert not check.passed
    assert "not in 1 rows, first rows:4" in check.detail
    # A row that was cut has no end to learn.
    ended[3] = replace(ROWS[3], truncated=True)
    assert checks.end_of_turn_supervised(ended, frozenset({EOS})).passed
    # The end is there but stands outside the loss: the worst of these, since the text looks right.
    mask = (*ended[0].supervised[:-1], False)
    ended[0] = replace(ended[0], supervised=mask)
    assert not checks.end_of_turn_supervised(ended, frozenset({EOS})).passed


def test_batch_that_cannot_be_overfitted() -> None:
    case = Case(trained=False)
    assert checks.one_batch_overfits(case.model, case.lora, case.batch, 1e-2).passed
    assert not checks.one_batch_overfits(case.model, case.lora, case.batch, 1e-7).passed
    # A rate at which the loss becomes NaN is no success either.
    assert not checks.one_batch_overfits(case.model, case.lora, case.batch, 1e30).passed


def test_b_that_did_not_move() -> None:
    case = Case()
    assert checks.every_update_moved(case.lora, case.start).detail == "14/14 B moved"
    case.factors[UP].B.data.copy_(case.start[UP])
    check = checks.every_update_moved(case.lora, case.start)
    assert not check.passed
    assert check.detail == f"13/14 B moved; not {UP}"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["A", "B"])
def test_adapter_that_is_not_finite(tensor: str, value: float) -> None:
    case = Case()
    getattr(case.factors[UP], tensor).data[1, 1] = value
    check = checks.all_finite(case.lora)
    assert not check.passed
    assert check.detail == UP
    with pytest.raises((AdapterFileError, AdapterStateError)):
        case.reload()


def test_reload_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    saved = Adapters.saved

    def rounded(self: Adapters, name: str | None = None) -> SavedAdapter:
        """Writes bf16 where the live adapter is fp32: what is reloaded is another adapter."""
        value = saved(self, name)
        factors = {path: Factors(f.A.bfloat16(), f.B.bfloat16()) for path, f in value.factors.items()}
        return replace(value, factors=factors)

    assert case.reload().passed
    monkeypatch.setattr(Adapters, "saved", rounded)
    check = case.reload()
    assert not check.passed
    assert case.lora.names == ("default",)


def test_reload_that_loses_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    saved = Adapters.saved
    monkeypatch.setattr(
        Adapters,
        "saved",
        lambda self, name=None: replace(saved(self, name), config=saved(self, name).config.replace(lora_alpha=16.0)),
    )
    assert not case.reload().passed


@pytest.mark.parametrize("factor", [0.5, 2.0, -1.0])
def test_wrong_scale_in_the_merge(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    assert case.merged().passed
    delta = LowRank.delta
    monkeypatch.setattr(LowRank, "delta", lambda self, dtype=torch.float32: delta(self, dtype) * factor)
    check = case.merged()
    assert not check.passed
    assert "not W + s·BA" in check.detail


def test_wrong_scale_in_the_merge_of_a_bf16_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding the merged weight must pass, half the update must not: also in bf16, where the limit is wider."""
    case = Case(steps=20, lr=2e-2)
    case.model.to(torch.bfloat16)
    for low_rank in case.factors.values():
        low_rank.to(torch.float32)
    with case.lora.disabled():
        case.base_logits = checks.eval_logits(case.model, case.batch)
    assert case.merged().passed
    delta = LowRank.delta
    monkeypatch.setattr(LowRank, "delta", lambda self, dtype=torch.float32: delta(self, dtype) * 0.5)
    assert not case.merged().passed


def test_unmerge_that_does_not_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    unmerge = Adapters.unmerge

    def forgetful(self: Adapters) -> None:
        unmerge(self)
        case.model.get_submodule(UP).weight.data[0, 0] += 1e-3

    monkeypatch.setattr(Adapters, "unmerge", forgetful)
    check = case.merged()
    assert not check.passed
    assert check.detail == "unmerging did not restore the model"


def test_changed_base_weight() -> None:
    case = Case()
    assert case.off().passed
    case.model.get_submodule(UP).weight.data[0] *= 1.05
    check = case.off()
    assert not check.passed
    assert "base weights changed" in check.detail


def test_changed_weight_that_no_probe_sees() -> None:
    """An embedding of a token that stands in no probe changes no logits; the fingerprint sees it."""
    case = Case()
    used = set(case.batch.input_ids.flatten().tolist())
    unused = next(token for token in range(3, 400) if token not in used)
    case.model.get_input_embeddings().weight.data[unused] += 1.0
    check = case.off()
    assert not check.passed
    assert check.detail.startswith("off 0,")


def test_adapter_without_an_effect() -> None:
    case = Case(trained=False)
    check = case.off()
    assert not check.passed
    assert "off 0, on 0" in check.detail


def test_disabled_that_does_not_disable(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    case = Case()
    monkeypatch.setattr(Adapters, "disabled", lambda _: nullcontext())
    assert not case.off().passed


def test_divergence_of_logits() -> None:
    a = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    assert checks.divergence(a, a) == 0.0
    assert checks.divergence(a, a + 3.0) == pytest.approx(0.0, abs=1e-12)
    b = a.clone()
    b[2, 3] += 1.0
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    assert checks.divergence(a, b) == pytest.approx(float((p * (p / q).log()).sum() / 5))


def test_eval_logits_restore_the_mode(tmp_path: Path) -> None:
    case = Case(trained=False, dropout=0.5)
    case.model.train()
    first = checks.eval_logits(case.model, case.batch)
    assert case.model.training
    assert torch.equal(first, checks.eval_logits(case.model, case.batch))
    assert not first.requires_grad
