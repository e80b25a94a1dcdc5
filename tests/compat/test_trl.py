"""TRL's trainers over a model with adapters: their losses read the head's weight, and preferences a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer import dpo_trainer

import loratune as lt
from loratune.compat.trainer import AdapterTraining
from loratune.errors import AdapterStateError
from tests.compat.trainers import common, losses
from tests.models import additions, tiny
from tests.tiny import tiny_tokenizer


class AdapterSFTTrainer(AdapterTraining, SFTTrainer):
    pass


class AdapterDPOTrainer(AdapterTraining, DPOTrainer):
    pass


ROWS = additions(8)
PREFERENCES = [{"prompt": row["prompt"], "chosen": " " + row["completion"], "rejected": " no"} for row in ROWS]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Precomputed log-probabilities are kept where the data are."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def attached(family: str = "llama", **settings: Any) -> tuple[Any, lt.Adapters]:
    torch.manual_seed(7)
    model = tiny(family)
    return model, lt.attach(model, lt.LoraConfig(**{"r": 4, "target_modules": "all-linear", **settings}))


def longer(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    return common(folder, **{"max_steps": 4, "per_device_train_batch_size": 4, "bf16": False, **settings})


def sft(folder: Path, model: Any, **settings: Any) -> Trainer:
    rows = Dataset.from_list(ROWS)
    arguments = SFTConfig(**longer(folder, settings))
    return AdapterSFTTrainer(model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer())


def dpo(folder: Path, model: Any, reference: Any, **settings: Any) -> Any:
    rows = Dataset.from_list(PREFERENCES)
    arguments = DPOConfig(**longer(folder, settings))
    return AdapterDPOTrainer(
        model, reference, arguments, train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer()
    )


def plain_loss(trainer: Any) -> float:
    """Of the evaluation rows, by the model's own forward in one batch."""
    batch = next(iter(trainer.get_eval_dataloader()))
    batch.pop("completion_mask", None)
    forward = type(trainer.model).forward
    with torch.no_grad():
        return float(forward(trainer.model.eval(), **batch).loss)


@pytest.mark.parametrize(
    "given",
    [{}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["all-linear", "head"],
)
def test_sft_computes_the_models_own_loss(tmp_path: Path, given: dict[str, Any]) -> None:
    """Its fused head reads the weight, which is the adapter's where the head is trained whole."""
    model, lora = attached(**given)
    before = {name: tensor.clone() for name, tensor in lora.base_state().items()}
    trainer = sft(tmp_path, model)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain_loss(trainer), rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora.base_state().items())
    for name, replaced in lora.replaced().items():
        assert not torch.equal(replaced, before[name])


@pytest.mark.parametrize("train", [sft, lambda *given: dpo(*given, lt.adapters(given[1]).reference())])
def test_an_adapter_of_the_head_is_refused(tmp_path: Path, train: Any) -> None:
    """TRL refuses PEFT's, and would read past ours without a word."""
    model, _ = attached(target_modules=["q_proj", "lm_head"])
    with pytest.raises(AdapterStateError, match=r"no gradient .* in lm_head"):
        train(tmp_path, model).train()


@pytest.mark.full
@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 48}], ids=["rows", "packed"])
def test_sft_goes_on_from_its_checkpoint(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, **settings}
    (straight, first), (broken, second) = attached(), attached()
    trainer = sft(tmp_path, straight, **settings)
    trainer.train()
    again = sft(tmp_path, broken, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(trainer)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        pytest.param("llama", {"bf16": True}, marks=pytest.mark.full),
        pytest.param("gpt2", {"bf16": True, "disable_dropout": False}, marks=pytest.mark.full),
    ],
    ids=["fp32", "bf16", "dropout"],
)
def test_dpo_with_the_reference_is_dpo_with_a_copy_of_the_base(
    tmp_path: Path, family: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a second model is loaded")

    monkeypatch.setattr(dpo_trainer, "create_model_from_path", refuse)
    found = []
    for copied in (False, True):
        model, lora = attached(family)
        trainer = dpo(tmp_path, model, tiny(family) if copied else lora.reference(), **settings)
        trainer.train()
        found.append((losses(trainer), [*lora.parameters()], dict(lora.base_state())))
    ours, theirs = found
    assert ours[0] == theirs[0]
    assert ours[0][-1] < ours[0][0] == pytest.approx(0.6931472, abs=0.1 if settings else 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))
    assert all(torch.equal(tensor, ours[2][name]) for name, tensor in tiny(family).state_dict().items())


def test_the_references_log_probabilities_are_the_unattached_bases(tmp_path: Path) -> None:
    """Bit for bit, and after training too."""
    model, lora = attached()
    trainer = dpo(tmp_path / "ours", model, lora.reference())
    trainer.train()
    twin, _ = attached()
    other = dpo(tmp_path / "theirs", twin, tiny())
    batch = next(iter(trainer.get_eval_dataloader()))
    ours = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    theirs = other.compute_ref_log_probs(other.ref_model, batch)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    policy = trainer.compute_ref_log_probs(model, batch)
    assert not torch.equal(policy[0], ours[0])


@pytest.mark.full
@pytest.mark.parametrize("given", [True, False], ids=["reference", "none"])
def test_log_probabilities_computed_before_are_the_same(tmp_path: Path, given: bool) -> None:
    """Before the first step the model is its own reference, so that none need be given."""
    (model, lora), (twin, other) = attached(), attached()
    before = dpo(tmp_path, model, lora.reference() if given else None, precompute_ref_log_probs=True)
    during = dpo(tmp_path, twin, other.reference())
    before.train()
    during.train()
    assert losses(before) == pytest.approx(losses(during), rel=1e-5)


def test_dpo_goes_on_from_an_adapter_and_from_its_checkpoint(tmp_path: Path) -> None:
    """The adapter of instructions is the reference of the one that learns preferences."""
    model, lora = attached()
    sft(tmp_path / "sft", model).train()
    lora.save(tmp_path / "sft")

    def second_stage() -> tuple[Any, lt.Adapters]:
        model = tiny()
        lora = lt.attach(model, tmp_path / "sft", trainable=True)
        lora.load(tmp_path / "sft", "before")
        trainer = dpo(tmp_path / "dpo", model, lora.reference("before"), save_strategy="steps", save_steps=2)
        return trainer, lora

    straight, first = second_stage()
    straight.train()
    assert losses(straight)[0] == pytest.approx(0.6931472)
    broken, second = second_stage()
    broken.train(resume_from_checkpoint=str(tmp_path / "dpo" / "checkpoint-2"))
    assert losses(broken) == losses(straight)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.full
@pytest.mark.parametrize("train", [sft, lambda *given, **more: dpo(*given, lt.adapters(given[1]).reference(), **more)])
def test_compiled_steps_are_the_steps(tmp_path: Path, train: Any) -> None:
    found = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        trainer = train(tmp_path, attached()[0], **settings)
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
