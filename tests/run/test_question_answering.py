"""Runs that learn where an answer stands: over families, in windows, and what is left is enough to go on."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from loratune.errors import ModelError
from loratune.run.answer import evaluate
from loratune.run.events import Said
from loratune.run.merge import merge
from loratune.run.opened import Opened, open_run
from loratune.run.train import Run, train
from tests.families.zoo import built
from tests.models import saved_encoder
from tests.run.test_tasks import LEARN
from tests.tiny import tiny_tokenizer

CITIES = ("Paris", "Berlin")


def asked(count: int, *, words: int = 6, silent: bool = False) -> list[dict[str, Any]]:
    """Contexts with one city in them, which is the answer; where `silent`, each third has none."""
    dice, rows = random.Random(0), []
    for number in range(count):
        context = dice.choices(("fine", "lazy", "Hello", "stop", "dog"), k=words)
        city = "" if silent and number % 3 == 0 else CITIES[number % 2]
        context.insert(dice.randrange(1, words), f"{city} 21")
        text = " ".join(context)
        found = {"text": [city], "answer_start": [text.index(city)]} if city else {"text": [], "answer_start": []}
        rows.append({"question": "Where?", "context": text, "answers": found})
    return rows


SETTINGS: dict[str, Any] = {**LEARN, "max_steps": 60, "r": 8}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(saved_encoder(tmp_path_factory.mktemp("bases") / "bert"))


@pytest.fixture(scope="module")
def told(bert: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, str]]:
    said: dict[str, str] = {}
    out = str(tmp_path_factory.mktemp("runs") / "told")
    run = train(bert, asked(60, silent=True), out=out, listen=lambda e: hear(said, e), **{**SETTINGS, "checks": "full"})
    return run, said


def hear(said: dict[str, str], event: Any) -> None:
    if isinstance(event, Said):
        said[event.topic] = event.text


def test_encoder_learns_where_answers_stand(told: tuple[Run, dict[str, str]]) -> None:
    run, said = told
    record = run.record
    assert record["settings"]["task_type"]["reason"] == "BertModel reads, rows question/context/answers"
    assert record["task"] == {"type": "QUESTION_ANS", "labels": [], "seed": 3, "unit": "ends", "fresh": ["qa_outputs"]}
    assert "104 ends to learn · 52 windows · 18 without answer" in said["data"]
    assert all(check["passed"] for check in record["checks"])
    assert len(record["checks"]) == 8
    assert record["result"]["val_loss"] < record["result"]["base_val_loss"]
    base, tuned = (record["result"]["metrics"][which] for which in ("base", "tuned"))
    assert tuned["f1"] > max(base["f1"], tuned["trivial_f1"]) + 0.2
    assert tuned["exact_match"] > base["exact_match"] + 0.2
    assert "question-answering" in (run.path / "README.md").read_text()
    assert "AutoModelForQuestionAnswering" in (run.path / "report.html").read_text()
    samples = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert {sample["reference"] for sample in samples} <= {"", *CITIES}
    assert sum(sample["tuned"] == sample["reference"] for sample in samples) >= 3
    assert all(sample["prompt"].startswith("Where?") for sample in samples)


def test_a_row_is_one_however_many_windows_it_has(bert: str, tmp_path: Path) -> None:
    settings = {**SETTINGS, "max_steps": 2, "max_length": 30}
    said: dict[str, str] = {}
    rows = asked(20, words=30)
    run = train(bert, rows, out=str(tmp_path / "run"), listen=lambda e: hear(said, e), **settings)
    data = run.record["data"]
    assert (data["rows"], data["train"], data["val"]) == (20, 12, 8)
    assert data["taught"]["in_several_windows"] == 12
    assert data["fit"]["rows"] == data["taught"]["windows"] > 24
    samples = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert len({sample["place"] for sample in samples}) == len(samples) == 4
    found = evaluate(open_run(str(run.path)), rows, max_length=30)
    assert found["rows"] == 20
    assert found["supervised_ends"] > 40


def outputs(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(input_ids=ids)
    return torch.stack([found.start_logits, found.end_logits])


def both(opened: Opened, theirs: Any) -> tuple[Tensor, Tensor]:
    ids = opened.base.tokenizer("Where?", "lazy dog Paris 21", return_tensors="pt")["input_ids"]
    return outputs(opened.base.model, ids), outputs(theirs, ids)


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "gpt2", "llama"])
def test_trained_saved_and_read_again(family: str, tmp_path: Path) -> None:
    """Of bases whose files have the body and another head, or none; llama's has a body by another name."""
    head = {"bert": "SequenceClassification", "deberta-v2": "MaskedLM", "gpt2": "CausalLM"}.get(family)
    built(family, head=head or "QuestionAnswering").save_pretrained(tmp_path / "base")
    tiny_tokenizer(None, bos="<|begin_of_text|>", adds_bos=True).save_pretrained(tmp_path / "base")
    settings = {**SETTINGS, "task_type": "QUESTION_ANS", "max_steps": 6}
    run = train(str(tmp_path / "base"), asked(40), out=str(tmp_path / "run"), **settings)
    assert run.record["task"]["fresh"] == ["qa_outputs"]
    assert {one["name"] for one in run.record["adapter"]["replaced"]} == {"qa_outputs.weight", "qa_outputs.bias"}
    assert all(check["passed"] for check in run.record["checks"])
    config = json.loads((run.path / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("QUESTION_ANS", ["qa_outputs"])

    opened = open_run(str(run.path))
    theirs = peft.PeftModel.from_pretrained(opened.base.head.auto.from_pretrained(tmp_path / "base"), run.path)
    assert isinstance(theirs, peft.PeftModelForQuestionAnswering)
    found, expected = both(opened, theirs.eval())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert opened.lora is not None
    with opened.lora.disabled():
        assert float((both(opened, theirs)[0] - expected).norm() / expected.norm()) > 1e-3

    # What peft writes of it is read here, without the run's record.
    theirs.save_pretrained(tmp_path / "theirs")
    found = both(open_run(str(tmp_path / "theirs"), base=str(tmp_path / "base"), dtype="fp32"), theirs)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_decoder_with_another_name_for_its_body_is_refused(tmp_path: Path) -> None:
    """transformers looks for llama's body under another name, and would draw all of it at random."""
    built("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer(None).save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=r"transformer\.layers\.0\.\S+ is missing"):
        train(str(tmp_path / "base"), asked(20), out=str(tmp_path / "run"), task_type="QUESTION_ANS", **LEARN)


def test_folder_and_base_are_enough_to_measure_again(told: tuple[Run, dict[str, str]], tmp_path: Path) -> None:
    run, _ = told
    rows = asked(60, silent=True)
    found = evaluate(open_run(str(run.path)), rows)
    assert (found["rows"], found["supervised_ends"]) == (60, 120)
    for name in ("adapter_config.json", "adapter_model.safetensors", "loratune.json"):
        (tmp_path / "plain").mkdir(exist_ok=True)
        shutil.copy(run.path / name, tmp_path / "plain")
    assert evaluate(open_run(str(tmp_path / "plain"), dtype="fp32"), rows) == pytest.approx(found)
    merge(open_run(str(run.path)), str(tmp_path / "merged"))
    merged = evaluate(open_run(str(tmp_path / "merged"), dtype="fp32"), rows)
    assert merged == pytest.approx(found, rel=1e-4)


def test_split_of_a_step_changes_nothing(bert: str, tmp_path: Path) -> None:
    rows, settings = asked(60, silent=True), {**SETTINGS, "max_steps": 8, "checks": "off"}
    runs = [train(bert, rows, out=str(tmp_path / str(n)), micro_batch_tokens=n, **settings) for n in (60, 2048)]
    lines = [[json.loads(line) for line in (run.path / "metrics.jsonl").open()] for run in runs]
    for one, other in zip(*lines, strict=True):
        for name in {"loss", "grad_norm", "val_loss"} & set(one):
            assert one[name] == pytest.approx(other[name], rel=1e-3)
    # Two ends of each of eight windows, and of the four that an epoch's last step has.
    assert {line["supervised_tokens"] for line in lines[0] if "loss" in line} == {8, 16}


def test_model_of_three_labels_gets_two_ends(tmp_path: Path) -> None:
    """Some families make this head of as many outputs as the config has labels."""
    saved_encoder(tmp_path / "base", kind="BertForSequenceClassification", num_labels=3)
    settings = {**SETTINGS, "task_type": "QUESTION_ANS", "max_steps": 1, "checks": "off"}
    run = train(str(tmp_path / "base"), asked(20), out=str(tmp_path / "run"), **settings)
    assert evaluate(open_run(str(run.path)), asked(4))["rows"] == 4
