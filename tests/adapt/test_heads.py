"""New heads of classifiers train, save and load without being named (BEHAVIOUR 15)."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratune as lt
from loratune.errors import AdapterFileError
from tests.models import PAD, VOCABULARY

WIDE = {"vocab_size": VOCABULARY, "num_labels": 3, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": 1}
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    **WIDE,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.2, **WIDE}

# Model → (config class and values, what kind of model, targets, task, the tensors of its head).
HEADS: dict[str, tuple[str, dict[str, Any], str, list[str], str, set[str]]] = {
    "llama": ("LlamaConfig", LLAMA, "SequenceClassification", ["q_proj"], "SEQ_CLS", {"score.weight"}),
    "gpt2": ("GPT2Config", GPT2, "SequenceClassification", ["c_attn"], "SEQ_CLS", {"score.weight"}),
    "tokens": ("LlamaConfig", LLAMA, "TokenClassification", ["q_proj"], "TOKEN_CLS", {"score.weight", "score.bias"}),
    "answers": (
        "LlamaConfig",
        LLAMA,
        "QuestionAnswering",
        ["q_proj"],
        "QUESTION_ANS",
        {"qa_outputs.weight", "qa_outputs.bias"},
    ),
}
IDS = torch.arange(2 * 5).view(2, 5) * 17 % VOCABULARY
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def classifier(kind: str) -> Any:
    config_class, values, auto, *_ = HEADS[kind]
    config = getattr(transformers, config_class)(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"AutoModelFor{auto}").from_config(config).eval()


def output(model: Any) -> Tensor:
    with torch.no_grad():
        return logits_of(model(IDS))


def logits_of(found: Any) -> Tensor:
    name = "start_logits" if "start_logits" in found else "logits"
    return found[name]  # type: ignore[no-any-return]


def adapted(kind: str, **settings: Any) -> tuple[Any, lt.Adapters]:
    model = classifier(kind)
    handle = lt.attach(model, lt.LoraConfig(r=2, **{"target_modules": HEADS[kind][3], **settings}))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model, handle


@pytest.mark.parametrize("kind", HEADS)
def test_the_head_is_found_trained_saved_and_loaded(tmp_path: Path, kind: str) -> None:
    *_, task, head = HEADS[kind]
    plain = output(classifier(kind))
    model, handle = adapted(kind)
    assert handle.config().task_type == task
    assert set(handle.replaced()) == head
    logits_of(model(IDS)).square().sum().backward()
    assert all(own.grad is not None for own in handle.replaced().values())
    handle.save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["task_type"], config["modules_to_save"]) == (task, [next(iter(head)).partition(".")[0]])
    assert {f"base_model.model.{name}" for name in head} <= load_file(tmp_path / TENSORS).keys()
    again = classifier(kind)
    lt.attach(again, tmp_path)
    assert torch.equal(output(again), output(model))
    assert not torch.allclose(output(model), plain, atol=1e-2)
    with handle.disabled():
        assert torch.equal(output(model), plain)
    handle.merge()
    assert torch.allclose(output(model), output(again), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "tokens"])
def test_the_head_of_another_load_is_the_same_base(tmp_path: Path, kind: str) -> None:
    model, handle = adapted(kind)
    handle.save(tmp_path)
    other = classifier(kind)
    with torch.no_grad():
        other.score.weight.normal_()  # `from_pretrained` of a base without a head draws it anew
    lt.attach(other, tmp_path)
    assert torch.equal(output(other), output(model))


@pytest.mark.parametrize("kind", HEADS)
def test_peft_reads_it(tmp_path: Path, kind: str) -> None:
    model, handle = adapted(kind, bias="all")
    handle.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(classifier(kind), tmp_path).eval()
    assert torch.allclose(output(loaded), output(model), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "tokens"])
def test_what_peft_writes_for_it_is_read_with_a_note(tmp_path: Path, kind: str) -> None:
    _, _, _, targets, task, head = HEADS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(classifier(kind), peft.LoraConfig(r=2, target_modules=targets, task_type=task))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    asked = json.loads((tmp_path / "theirs" / CONFIG).read_text())["modules_to_save"]
    assert sorted(asked) == ["classifier", "score"]
    model = classifier(kind)
    handle = lt.attach(model, tmp_path / "theirs")
    assert torch.allclose(output(model), output(theirs), atol=1e-5)
    assert set(handle.replaced()) == head
    assert any("this model has no 'classifier', its head is score" in note for note in handle.plan().notes)
    handle.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["modules_to_save"] == ["score"]
    assert (tmp_path / "theirs" / TENSORS).read_bytes() == (tmp_path / "again" / TENSORS).read_bytes()


def test_a_head_that_is_a_target_by_name_is_adapted_instead() -> None:
    model = classifier("llama")
    handle = lt.attach(model, lt.LoraConfig(r=2, target_modules=["q_proj", "score"]))
    assert not handle.replaced()
    assert "score" in handle.factors()


def test_naming_the_head_changes_nothing() -> None:
    named = lt.plan(classifier("llama"), lt.LoraConfig(target_modules=["q_proj"], modules_to_save=["score"]))
    found = lt.plan(classifier("llama"), lt.LoraConfig(target_modules=["q_proj"]))
    assert (named.replaced, named.saved, named.notes) == (found.replaced, ("score",), ())


def test_a_file_without_the_head_is_refused(tmp_path: Path) -> None:
    adapted("llama")[1].save(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    del tensors["base_model.model.score.weight"]
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(AdapterFileError, match=r"no tensor score\.weight, which its config saves"):
        lt.attach(classifier("llama"), tmp_path)
    tensors["base_model.model.score.weight"] = torch.zeros(4, 16)
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(AdapterFileError, match=r"score\.weight \(4, 16\), expected \(3, 16\)"):
        lt.attach(classifier("llama"), tmp_path)
