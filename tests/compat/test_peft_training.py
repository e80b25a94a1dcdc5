"""Training a `PeftModel`: plain loops, transformers' Trainer, checkpoints, recomputed activations."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer
from transformers.trainer_utils import validate_quantization_for_training

from loratune.compat.peft import LoraConfig, PeftModel, get_peft_model
from loratune.compat.trainer import AdapterTraining
from tests.adapter.cases import IDS, gap, logits
from tests.compat.trainers import arguments, data
from tests.compat.twin import adapter, both
from tests.models import tiny


class OurTrainer(AdapterTraining, Trainer):
    pass


def fresh(family: str = "gpt2") -> PeftModel:
    torch.manual_seed(7)
    return get_peft_model(tiny(family), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


LOOP = """
from peft import PeftModel
model = PeftModel.from_pretrained(tiny("llama"), folder, is_trainable=True)
model.train()
modes = [model.training, model.get_base_model().training]
frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(3):
    optimizer.zero_grad()
    loss = model(IDS, torch.ones_like(IDS), labels=IDS).loss
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
untouched = all(torch.equal(p, frozen[name]) and p.grad is None
                for name, p in model.named_parameters() if name in frozen)
out = model.eval()(IDS).logits.detach()
"""


def test_plain_loop(tmp_path: Path) -> None:
    theirs, ours = both(LOOP, folder=str(adapter(tmp_path, family="llama")))
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    assert gap(ours.out, theirs.out) < 1e-3
    assert ours.untouched
    assert ours.modes == theirs.modes


RECOMPUTED = """
from peft import LoraConfig, PeftModel
model = tiny("llama")
model.activation_checkpointing_enable({"use_reentrant": True})
model = PeftModel.from_pretrained(model, folder, is_trainable=True).train()
model(input_ids=IDS, labels=IDS).loss.backward()
grads = [p.grad for p in model.parameters() if p.requires_grad]
"""


def test_reentrant_recomputation_reaches_the_adapters(tmp_path: Path) -> None:
    theirs, ours = both(RECOMPUTED, folder=str(adapter(tmp_path, family="llama")))
    for ours_, theirs_ in zip(ours.grads, theirs.grads, strict=True):
        assert gap(ours_, theirs_) < 1e-4


TRAINER = """
from transformers import Trainer
from peft import PeftModel
model = PeftModel.from_pretrained(tiny("llama"), folder, is_trainable=True)
trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:2])
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
eval_loss = trainer.evaluate()["eval_loss"]
labels = trainer.label_names
model.save_pretrained(out)
out = model.eval()(IDS).logits.detach()
"""


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
@pytest.mark.parametrize("settings", [{}, {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2}])
def test_trainer_gives_what_it_gives_with_peft(tmp_path: Path, settings: dict[str, Any], task: str | None) -> None:
    """The Trainer asks a model for its columns, its labels, its class and how it counts tokens."""
    folder = adapter(tmp_path / "adapter", family="llama", task_type=task)
    args = arguments(tmp_path / "run", **settings)
    theirs, ours = both(TRAINER, folder=str(folder), args=args, rows=data(), out=str(tmp_path / "trained"))
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-3)
    assert ours.eval_loss == pytest.approx(theirs.eval_loss, rel=1e-3)
    assert ours.labels == theirs.labels == ["labels"]
    assert gap(ours.out, theirs.out) < 1e-3
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "trained")
    assert torch.equal(logits(again), ours.out)


def test_checkpoints_hold_the_adapter_alone(tmp_path: Path) -> None:
    model = fresh()
    OurTrainer(model, arguments(tmp_path, save_strategy="steps", save_steps=1), train_dataset=data()).train()
    last = tmp_path / "checkpoint-2"
    assert sorted(path.name for path in last.glob("adapter*")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not (last / "model.safetensors").exists()
    again = PeftModel.from_pretrained(tiny("gpt2"), last)
    assert torch.equal(logits(again), logits(model.eval()))
    assert not torch.equal(logits(again), logits(tiny("gpt2")))


def test_trainer_resumes_from_a_checkpoint_of_adapters(tmp_path: Path) -> None:
    def trainer(model: PeftModel, **settings: Any) -> Trainer:
        return OurTrainer(
            model, arguments(tmp_path, save_strategy="steps", save_steps=2, **settings), train_dataset=data()
        )

    straight, broken = fresh("llama"), fresh("llama")
    trainer(straight, max_steps=4).train()
    trainer(broken, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(broken.eval()), logits(straight.eval()))
    assert broken.get_nb_trainable_parameters()[0] > 0


def test_trainer_loads_the_best_checkpoint(tmp_path: Path) -> None:
    model = fresh("llama")
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    # The loss falls, so the best by this measure is not the last.
    args = arguments(tmp_path, load_best_model_at_end=True, greater_is_better=True, **settings)
    trainer = OurTrainer(model, args, train_dataset=data(), eval_dataset=data(2))
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    assert torch.equal(logits(model.eval()), logits(PeftModel.from_pretrained(tiny("llama"), best)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_bare_trainer_saves_adapters(tmp_path: Path, family: str) -> None:
    """It asks by isinstance whether something can save itself; gpt2's weights are tied, and no whole base could be."""
    model = fresh(family)
    assert isinstance(model, PeftModel)
    trainer = Trainer(model, arguments(tmp_path, save_strategy="steps", save_steps=2), train_dataset=data())
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-2", tmp_path / "final"):
        assert not (folder / "model.safetensors").exists()
        assert torch.equal(logits(model.eval()), logits(PeftModel.from_pretrained(tiny(family), folder)))


def test_trainer_takes_a_quantised_base_with_adapters() -> None:
    base = tiny("llama")
    base.is_quantized, base.hf_quantizer = True, SimpleNamespace(is_trainable=True, is_qat_trainable=False)
    with pytest.raises(ValueError, match="quantized"):
        validate_quantization_for_training(base)
    validate_quantization_for_training(get_peft_model(base, LoraConfig(target_modules=["q_proj"])))


def test_model_without_adapters_in_training_is_itself() -> None:
    model = fresh()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny("gpt2")))
    assert torch.equal(model(IDS).logits, logits(tiny("gpt2")))
