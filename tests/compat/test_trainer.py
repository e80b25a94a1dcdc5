"""transformers' Trainer over a model with adapters, alone and with `AdapterTraining`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer

import loratune as lt
from loratune.compat.trainer import LIVE, AdapterTraining
from loratune.errors import AdapterFileError, AdapterStateError
from tests.adapter.cases import gap, logits
from tests.compat.trainers import arguments, data, losses
from tests.models import saved, tiny


class AdapterTrainer(AdapterTraining, Trainer):
    pass


EVERY_TWO: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def attached(family: str = "llama", *, quant: str | None = None, dtype: Any = None, **settings: Any) -> Any:
    torch.manual_seed(7)
    model = tiny(family)
    if dtype is not None:
        model.to(dtype)
    if quant is not None:
        lt.quantize(model, quant)
    lt.attach(model, lt.LoraConfig(**{"r": 4, "target_modules": "all-linear", **settings}))
    return model


def trained(folder: Path, model: Any, kind: type[Trainer] = AdapterTrainer, **settings: Any) -> Trainer:
    trainer = kind(model, arguments(folder, **settings), train_dataset=data(), eval_dataset=data(2))
    trainer.train()
    return trainer


def live(model: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in lt.adapters(model).parameters()]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- what a training does ----------------------------------------------------------------------------------------

RECOMPUTED = {"gradient_checkpointing": True}
REENTRANT = {**RECOMPUTED, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}


@pytest.mark.parametrize(
    ("quant", "settings"),
    [
        (None, {}),
        (None, RECOMPUTED),
        pytest.param(None, REENTRANT, marks=pytest.mark.full),
        (None, {"bf16": True, "gradient_accumulation_steps": 2}),
        (None, COMPILED),
        ("nf4", RECOMPUTED),
        pytest.param("int8", {"bf16": True}, marks=pytest.mark.full),
    ],
    ids=["plain", "recomputed", "reentrant", "bf16", "compiled", "nf4", "int8"],
)
def test_it_learns_and_only_the_adapter_changes(tmp_path: Path, quant: str | None, settings: dict[str, Any]) -> None:
    model = attached(quant=quant)
    lora = lt.adapters(model)
    before = {name: tensor.clone() for name, tensor in lora.base_state().items()}
    trainer = trained(tmp_path, model, max_steps=12, eval_strategy="steps", eval_steps=6, **settings)
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated[1] < evaluated[0]
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    now = lora.base_state()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in before)
    assert all(parameter.grad is None for _, parameter in lora.base_parameters())


@pytest.mark.full
@pytest.mark.parametrize("settings", [RECOMPUTED, REENTRANT], ids=["recomputed", "reentrant"])
def test_recomputing_gives_the_same_bits(tmp_path: Path, settings: dict[str, Any]) -> None:
    kept, recomputed = (attached(lora_dropout=0.2) for _ in range(2))
    trained(tmp_path, kept)
    trained(tmp_path, recomputed, **settings)
    assert equal(live(kept), live(recomputed))


@pytest.mark.full
@pytest.mark.parametrize("settings", [{}, {"bf16": True}, RECOMPUTED], ids=["plain", "bf16", "recomputed"])
def test_compiled_steps_are_the_steps(tmp_path: Path, settings: dict[str, Any]) -> None:
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    a, b = (trained(tmp_path, attached(), max_steps=4, **settings, **more) for more in ({}, compiled))
    assert losses(a) == pytest.approx(losses(b), rel=1e-2 if settings else 1e-5)


# -- checkpoints -------------------------------------------------------------------------------------------------


def resumed(folder: Path, kind: type[Trainer], make: Any, **settings: Any) -> tuple[Trainer, Trainer]:
    """A run that was never interrupted, and one that goes on from where a third one of two steps stopped."""
    straight = trained(folder / "straight", make(), kind, **EVERY_TWO, **settings)
    shutil.rmtree(folder / "straight" / "checkpoint-4")
    broken = kind(
        make(), arguments(folder / "straight", **EVERY_TWO, **settings), train_dataset=data(), eval_dataset=data(2)
    )
    broken.train(resume_from_checkpoint=True)
    return straight, broken


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({"lora_dropout": 0.3}, {"gradient_accumulation_steps": 2, **RECOMPUTED}),
        pytest.param({"family": "gpt2", "bias": "all"}, {}, marks=pytest.mark.full),
        pytest.param({"quant": "nf4"}, {}, marks=pytest.mark.full),
        pytest.param({"init_lora_weights": "pissa"}, {}, marks=pytest.mark.full),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "dtype": torch.bfloat16}, {}),
    ],
    ids=["dropout", "biases", "nf4", "pissa", "masters"],
)
@pytest.mark.parametrize("kind", [Trainer, AdapterTrainer])
def test_it_goes_on_as_if_it_had_never_stopped(
    tmp_path: Path, kind: type[Trainer], given: dict[str, Any], settings: dict[str, Any]
) -> None:
    straight, broken = resumed(tmp_path, kind, lambda: attached(**given), **settings)
    assert len(losses(straight)) == 4
    assert losses(broken) == losses(straight)
    assert equal(live(broken.model), live(straight.model))


def test_it_goes_on_from_another_seeds_start(tmp_path: Path) -> None:
    """A and B start anywhere, and so does a random decomposition that the update counts from: all come back."""
    seeds = iter((7, 8))

    def make() -> Any:
        torch.manual_seed(next(seeds))
        model = tiny()
        lt.attach(model, lt.LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa_niter_1"))
        return model

    straight, broken = resumed(tmp_path, AdapterTrainer, make)
    assert losses(broken) == losses(straight)
    assert torch.equal(logits(broken.model.eval()), logits(straight.model.eval()))


def test_a_checkpoint_is_the_adapter_as_pefts_files(tmp_path: Path) -> None:
    model = attached()
    trainer = trained(tmp_path, model, **EVERY_TWO)
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-4", tmp_path / "final"):
        assert {"adapter_config.json", "adapter_model.safetensors"} <= names(folder)
        assert not {"model.safetensors", LIVE} & names(folder)
        again = tiny()
        lt.attach(again, folder)
        assert torch.equal(logits(again), logits(model.eval()))
        assert gap(logits(peft.PeftModel.from_pretrained(tiny(), folder)), logits(model)) < 1e-6


def test_without_it_a_checkpoint_holds_the_base_too(tmp_path: Path) -> None:
    model = attached()
    trained(tmp_path, model, Trainer, **EVERY_TWO)
    assert "model.safetensors" in names(tmp_path / "checkpoint-4")
    lt.adapters(model).save(tmp_path / "adapter")
    again = tiny()
    lt.attach(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model.eval()))


@pytest.mark.parametrize("kind", [Trainer, AdapterTrainer])
@pytest.mark.parametrize("start", [True, "pissa"])
def test_the_best_checkpoint_is_loaded(tmp_path: Path, kind: type[Trainer], start: Any) -> None:
    model = attached(init_lora_weights=start)
    # The loss falls, so the best by this measure is not the last.
    trainer = trained(
        tmp_path, model, kind, **EVERY_TWO, load_best_model_at_end=True, greater_is_better=True,
        eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    assert Path(str(trainer.state.best_model_checkpoint)).name == "checkpoint-2"
    again = attached(init_lora_weights=start)
    other = kind(again, arguments(tmp_path, **EVERY_TWO), train_dataset=data())
    other._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert equal(live(model), live(again))
    assert not equal(live(model), live(attached(init_lora_weights=start)))


def test_each_adapter_has_its_place(tmp_path: Path) -> None:
    def make() -> Any:
        model = attached()
        lora = lt.adapters(model)
        lora.add(lt.LoraConfig(r=2, target_modules=["q_proj"]), "second")
        lora.activate("default", "second")
        return model

    straight, broken = resumed(tmp_path, AdapterTrainer, make)
    assert "adapter_model.safetensors" in names(tmp_path / "straight" / "checkpoint-4" / "second")
    assert equal(live(broken.model), live(straight.model))


def test_files_of_an_earlier_run_are_not_gone_on_from(tmp_path: Path) -> None:
    trained(tmp_path, attached(init_lora_weights="pissa"), **EVERY_TWO)
    assert LIVE in names(tmp_path / "checkpoint-4")
    trained(tmp_path, attached(), **EVERY_TWO)
    assert LIVE not in names(tmp_path / "checkpoint-4")


# -- refusals ----------------------------------------------------------------------------------------------------


def test_a_model_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterStateError, match="no adapters"):
        AdapterTrainer(tiny(), arguments(tmp_path), train_dataset=data())


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, attached(init_lora_weights="pissa"), **EVERY_TWO)
    for other in (
        attached(init_lora_weights="pissa", r=2),
        attached(init_lora_weights="pissa", target_modules=["q_proj"]),
    ):
        before = live(other)
        trainer = AdapterTrainer(other, arguments(tmp_path, **EVERY_TWO), train_dataset=data())
        with pytest.raises(AdapterFileError, match="another adapter"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert equal(live(other), before)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, attached(init_lora_weights="pissa"), **EVERY_TWO)
    path = tmp_path / "checkpoint-2" / LIVE
    path.write_bytes(path.read_bytes()[:-8])
    trainer = AdapterTrainer(attached(init_lora_weights="pissa"), arguments(tmp_path), train_dataset=data())
    with pytest.raises(AdapterFileError, match="damaged"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


class ReadsPastTheHead(AdapterTrainer):
    """As fused losses do: from the head's weight."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        hidden = model.base_model(input_ids=inputs["input_ids"]).last_hidden_state[:, :-1]
        scores = hidden @ model.get_output_embeddings().weight.T
        return torch.nn.functional.cross_entropy(scores.flatten(0, 1), inputs["labels"][:, 1:].flatten())


def test_an_adapter_of_the_head_that_nothing_reaches_is_an_error(tmp_path: Path) -> None:
    head = attached(target_modules=["q_proj", "lm_head"])
    with pytest.raises(AdapterStateError, match=r"no gradient .* in lm_head"):
        trained(tmp_path, head, ReadsPastTheHead)
    trained(tmp_path, attached(target_modules=["q_proj", "lm_head"]))
    whole = attached(target_modules=["q_proj"], modules_to_save=["lm_head"])
    trained(tmp_path, whole, ReadsPastTheHead)
    assert not torch.equal(lt.adapters(whole).replaced()["lm_head.weight"], tiny().lm_head.weight)


# -- bases that transformers quantised ---------------------------------------------------------------------------


def test_a_base_in_four_bits_is_trained(tmp_path: Path) -> None:
    saved(tmp_path / "base", hidden_size=64, head_dim=16)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    lt.attach(model, lt.LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments(tmp_path), train_dataset=data())
    trainer = trained(tmp_path / "run", model, max_steps=8)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert not model._hf_peft_config_loaded, "to others this says that the model holds PEFT's own layers"
