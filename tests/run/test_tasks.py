"""Runs of encoders: what they are found to be for, that they learn it, and that what they leave is enough to go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    LlamaForSequenceClassification,
    M2M100Config,
    M2M100ForConditionalGeneration,
)

from loratune.cli import main
from loratune.data.example import Place
from loratune.data.labelled import Labelled, label_names, render_labelled
from loratune.data.pack import Layout, batches
from loratune.data.read import read
from loratune.data.tasks import DATA_TASKS
from loratune.data.translated import Translated
from loratune.engine import Sampling
from loratune.errors import ConfigError, DataError, LoratuneError, ModelError
from loratune.loss import logits_of, summed_loss
from loratune.model import Head, base_of, load_base
from loratune.run.answer import evaluate, generate
from loratune.run.conversation import Conversation
from loratune.run.events import Said, StepDone
from loratune.run.export import export
from loratune.run.merge import merge
from loratune.run.opened import open_run
from loratune.run.train import Run, train
from tests.models import encoder, moods, saved, saved_encoder, saved_t5, tiny, write_jsonl
from tests.tiny import tiny_tokenizer

LEARN: dict[str, Any] = {
    "max_steps": 24,
    "lr": 5e-3,
    "r": 4,
    "dtype": "fp32",
    "device": "cpu",
    "val": 8,
    "seed": 3,
    "checks": "fast",
}
Problems = Callable[..., list[str]]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(saved_encoder(tmp_path_factory.mktemp("bases") / "bert"))


@pytest.fixture(scope="module")
def told(bert: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(bert, moods(40), out=str(tmp_path_factory.mktemp("runs") / "told"), **{**LEARN, "checks": "full"})


def problems(error: type[LoratuneError], act: Callable[[], Any]) -> list[str]:
    with pytest.raises(error) as caught:
        act()
    assert caught.value.hint
    return list(caught.value.problems)


def test_encoder_learns_what_its_rows_have_labels_for(told: Run) -> None:
    record = told.record
    assert record["settings"]["task_type"] == {"value": "SEQ_CLS", "reason": "BertModel reads, rows text/label"}
    assert record["task"] == {
        "type": "SEQ_CLS", "labels": ["bad", "good"], "seed": 3, "unit": "rows", "fresh": ["classifier"],
    }  # fmt: skip
    assert record["result"]["val_loss"] < record["result"]["base_val_loss"]
    metrics = record["result"]["metrics"]
    assert metrics["tuned"]["accuracy"] == metrics["tuned"]["macro_f1"] == 1.0
    assert metrics["base"]["accuracy"] < 1.0
    assert all(check["passed"] for check in record["checks"])
    assert len(record["checks"]) == 8
    assert "accuracy 1.000" in (told.path / "README.md").read_text()
    assert "text-classification" in (told.path / "README.md").read_text()
    samples = [json.loads(line) for line in (told.path / "samples.jsonl").read_text().splitlines()]
    assert [s["tuned"] for s in samples] == [s["reference"] for s in samples]
    assert {s["reference"] for s in samples} <= {"bad", "good"}


def test_folder_and_base_are_enough_to_measure_again(told: Run) -> None:
    opened = open_run(str(told.path))
    assert opened.base.model.config.id2label == {0: "bad", 1: "good"}
    found = evaluate(opened, moods(40))
    assert (found["rows"], found["supervised_rows"], found["accuracy"]) == (40, 40, 1.0)
    assert "perplexity" not in found
    wrong = [{**row, "label": "good"} for row in moods(40)]
    assert evaluate(opened, wrong)["accuracy"] == 0.5


def test_plain_adapter_counts_its_labels(told: Run, tmp_path: Path) -> None:
    # Its hash of the base is there, the seed that the head was drawn from is not.
    for name in ("adapter_config.json", "adapter_model.safetensors", "loratune.json"):
        shutil.copy(told.path / name, tmp_path)
    rows = [{**row, "label": ("bad", "good").index(row["label"])} for row in moods(20)]
    assert evaluate(open_run(str(tmp_path), dtype="fp32"), rows)["accuracy"] == 1.0


def test_peft_gives_the_same_logits(told: Run, bert: str) -> None:
    names = {0: "bad", 1: "good"}
    base = AutoModelForSequenceClassification.from_pretrained(bert, id2label=names)
    theirs = peft.PeftModel.from_pretrained(base, told.path).eval()
    opened = open_run(str(told.path))
    inputs = opened.base.tokenizer(["fine thank you Hello fine", "lazy dog stop"], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = theirs(**inputs).logits
        torch.testing.assert_close(opened.base.model(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
    assert expected.argmax(-1).tolist() == [1, 0]


def test_merged_model_knows_its_labels(told: Run, tmp_path: Path) -> None:
    merge(open_run(str(told.path)), str(tmp_path / "merged"))
    assert evaluate(open_run(str(tmp_path / "merged")), moods(20))["accuracy"] == 1.0


def test_split_of_a_step_changes_nothing(told: Run, bert: str, tmp_path: Path) -> None:
    small = train(bert, moods(40), out=str(tmp_path / "small"), micro_batch_tokens=40, **LEARN)
    lines = [[json.loads(line) for line in (run.path / "metrics.jsonl").open()] for run in (told, small)]
    for one, other in zip(*lines, strict=True):
        for name in {"loss", "grad_norm", "val_loss"} & set(one):
            assert one[name] == pytest.approx(other[name], rel=1e-3)
    assert {line["supervised_tokens"] for line in lines[0] if "loss" in line} == {8}


@pytest.mark.parametrize("layout_limit", [30, 10_000])
def test_loss_is_that_of_rows_alone(layout_limit: int) -> None:
    model, tokenizer = encoder(kind="BertForSequenceClassification", num_labels=2), tiny_tokenizer(None)
    examples = read(moods(9), shapes=DATA_TASKS["SEQ_CLS"].shapes).examples
    rows = render_labelled(examples, tokenizer, labels=("bad", "good"), max_length=64).rows
    made = batches(rows, Layout.PADDED, limit=layout_limit, pad_id=2)
    assert (len(made) > 1) == (layout_limit == 30)
    total = sum(float(summed_loss(model, batch)) for batch in made)
    expected = 0.0
    for example in examples:
        ids = tokenizer(example.texts[0], return_tensors="pt")["input_ids"]
        logits = model(input_ids=ids).logits[0].double()
        expected -= float(logits.log_softmax(-1)[("bad", "good").index(example.labels[0])])
    assert total == pytest.approx(expected, rel=1e-5)
    assert sum(batch.supervised for batch in made) == 9
    assert logits_of(model, made[0]).shape == (made[0].examples, 2)


def test_causal_model_gets_a_head_only_when_asked(tmp_path: Path) -> None:
    tiny("llama", pad_token_id=None).save_pretrained(tmp_path / "llama")
    tiny_tokenizer(None).save_pretrained(tmp_path / "llama")
    base = str(tmp_path / "llama")
    said: dict[str, str] = {}

    def hear(event: Any) -> None:
        if isinstance(event, Said):
            said[event.topic] = event.text

    settings = {**LEARN, "max_steps": 1, "checks": "off"}
    usual = train(base, moods(20), out=str(tmp_path / "usual"), listen=hear, **settings)
    assert usual.record["settings"]["task_type"]["value"] == "CAUSAL_LM"
    assert usual.record["task"]["labels"] == []
    assert "labels are written as answers (--task SEQ_CLS: chosen)" in said["data"]
    asked = train(base, moods(40), out=str(tmp_path / "asked"), task="SEQ_CLS", listen=hear, **LEARN)
    assert said["plan"].startswith("SEQ_CLS (given) · r=4")
    assert "accuracy 1.000" in said["metrics"]
    assert asked.record["settings"]["task_type"] == {"value": "SEQ_CLS", "reason": "given"}
    assert asked.record["result"]["metrics"]["tuned"]["accuracy"] == 1.0
    assert evaluate(open_run(str(asked.path)), moods(20))["accuracy"] == 1.0


def test_encoder_decoder_learns_to_write(tmp_path: Path) -> None:
    base = str(saved_t5(tmp_path / "t5"))
    rows = [{"prompt": row["anchor"], "completion": row["positive"]} for row in matched(40)]
    settings = {**LEARN, "max_steps": 40, "lr": 1e-2, "r": 16}
    run = train(base, rows, out=str(tmp_path / "run"), **settings)
    record = run.record
    assert record["settings"]["task_type"]["value"] == record["task"]["type"] == "SEQ_2_SEQ_LM"
    assert record["settings"]["lora_dropout"]["value"] == 0.0
    assert "end of turn supervised" in {check["name"] for check in record["checks"] if check["passed"]}
    assert record["result"]["metrics"] == {"base": {"exact_match": 0.0}, "tuned": {"exact_match": 1.0}}
    opened = open_run(str(run.path))
    assert evaluate(opened, rows)["exact_match"] == 1.0
    theirs = peft.PeftModel.from_pretrained(opened.base.head.auto.from_pretrained(base), run.path).eval()
    ids = torch.tensor([[5, 6, 7, 1]])
    with torch.no_grad():
        found, expected = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (opened.base.model, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    (problem,) = problems(ConfigError, lambda: train(base, rows, out=str(tmp_path / "no"), dropout=0.1))
    assert "the decoder has others" in problem


def test_interrupted_run_goes_on_to_the_same_bits(told: Run, bert: str, tmp_path: Path) -> None:
    """The one loop, its checkpoints and its order serve every task."""
    stop = KeyboardInterrupt()

    def interrupt(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 12:
            raise stop

    settings = {**LEARN, "save_every": 5}
    with pytest.raises(KeyboardInterrupt):
        train(bert, moods(40), out=str(tmp_path / "run"), listen=interrupt, **settings)
    again = train(bert, moods(40), out=str(tmp_path / "run"), **settings)
    assert any(event["text"] == "continued after step 10" for event in again.record["events"])
    name = "adapter_model.safetensors"
    assert (again.path / name).read_bytes() == (told.path / name).read_bytes()


def test_commands(told: Run, bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_jsonl(tmp_path / "rows.jsonl", moods(20)))
    assert main(["eval", str(told.path), "--data", path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run"]["accuracy"], found["run"]["rows"]) == (1.0, 20)
    assert found["base"]["accuracy"] < 1.0
    assert main(["data", path, "--model", bert]) == 0
    assert "20 rows · text/label" in (line := capsys.readouterr().out.splitlines()[0])
    assert "2 labels (bad, good)" in line
    assert main(["plan", bert, path]) == 0
    assert "task_type = SEQ_CLS: BertModel reads, rows text/label" in capsys.readouterr().out
    assert main(["chat", str(told.path)]) == 2
    assert "loratune eval RUN --data FILE" in capsys.readouterr().err
    assert main(["compare", bert, path]) == 2
    assert "compare is of models that write" in capsys.readouterr().err


def test_bad_rows_are_reported_together(bert: str, tmp_path: Path) -> None:
    rows: list[Any] = moods(6)
    rows[1] = {"text": "no label here"}
    rows[2] = {"text": " ", "label": "bad"}
    rows[3] = {"text": "half", "label": 0.5}
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = problems(DataError, lambda: train(bert, str(path), out=str(tmp_path / "run")))
    assert found == [
        "rows.jsonl:2: has no 'label', which the other rows have (text/label); it has 'text'",
        "rows.jsonl:3: row without a text: it is empty",
        "rows.jsonl:4: column 'label' is 0.5, expected the name of a class or its whole number",
    ]
    assert not (tmp_path / "run").exists()


def test_labels_that_teach_nothing_or_are_unknown(bert: str, tmp_path: Path) -> None:
    same = [{**row, "label": "good"} for row in moods(8)]
    (found,) = problems(DataError, lambda: train(bert, same, out=str(tmp_path / "run")))
    assert "all rows have the label 'good'" in found
    held_out = [*moods(2), {"text": "odd", "label": "baad"}, {"text": "word " * 200, "label": "odd"}]
    found = problems(DataError, lambda: train(bert, moods(8), held_out=held_out, out=str(tmp_path / "run")))
    assert found[0] == "rows:3: label 'baad' is none of bad, good; did you mean 'bad'?"
    assert found[1].startswith("rows:4: label 'odd' is none of bad, good")
    assert found[2].startswith("rows:4: ")
    assert "longer than 128" in found[2]
    assert not (tmp_path / "run").exists()


def test_too_long_rows_are_cut_or_dropped_as_asked(told: Run) -> None:
    opened = open_run(str(told.path))
    rows = [*moods(3), {"text": "Hello " * 200, "label": "good"}]
    assert problems(DataError, lambda: evaluate(opened, rows))[0].startswith("rows:4: ")
    assert evaluate(opened, rows, overlong="drop")["dropped"] == 1
    assert evaluate(opened, rows, overlong="truncate")["rows"] == 4


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ((10, 9, "9"), ("9", "10")),
        (("b", "a", 1), ("1", "a", "b")),
        (("--1", "1"), ("--1", "1")),
        (("01", "1", -3), ("-3", "01", "1")),
    ],
)
def test_numbers_keep_their_order(labels: tuple[Any, ...], names: tuple[str, ...]) -> None:
    rows = [{"text": "x", "label": label} for label in labels]
    assert label_names(read(rows, shapes=DATA_TASKS["SEQ_CLS"].shapes).examples) == names


def test_what_only_a_writing_model_does_is_refused(told: Run, bert: str, tmp_path: Path) -> None:
    run = str(told.path)
    opened = open_run(run)
    acts: list[Callable[[], Any]] = [
        lambda: Conversation.open(run, vs=None, system=None, sampling=Sampling(4)),
        lambda: generate(opened, read([{"prompt": "a"}], answers=False).examples),
        lambda: evaluate(opened, moods(4), answers=2),
        lambda: export(run, str(tmp_path / "out"), to="vllm"),
        lambda: train(bert, moods(8), out=str(tmp_path / "run"), share_prefixes=True, loss="all"),
    ]
    for act in acts:
        for problem in problems(ConfigError, act):
            assert "SEQ_CLS" in problem
    assert not (tmp_path / "out").exists()


def test_base_without_a_layer_is_incomplete(tmp_path: Path) -> None:
    model = encoder()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("encoder.layer.1.")}
    model.save_pretrained(tmp_path / "bert", state_dict=state)
    tiny_tokenizer(None).save_pretrained(tmp_path / "bert")
    found = problems(ModelError, lambda: train(str(tmp_path / "bert"), moods(8), out=str(tmp_path / "run")))
    assert all("encoder.layer.1." in problem and "missing" in problem for problem in found)
    assert len(found) == 16


def test_what_stands_before_a_head_trains_too(tmp_path: Path) -> None:
    """DistilBERT's files have neither its classifier nor the layer before it, which peft's names match, too."""
    config = DistilBertConfig(
        vocab_size=400, dim=32, n_layers=2, n_heads=4, hidden_dim=64, pad_token_id=2, initializer_range=0.2
    )
    torch.manual_seed(0)
    DistilBertModel(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer(None, bos="<|begin_of_text|>", adds_bos=True).save_pretrained(tmp_path / "base")
    run = train(str(tmp_path / "base"), moods(40), out=str(tmp_path / "run"), **LEARN)
    assert run.record["task"]["fresh"] == ["pre_classifier", "classifier"]
    assert {one["name"] for one in run.record["adapter"]["replaced"]} >= {"pre_classifier.weight", "classifier.weight"}
    assert run.record["result"]["metrics"]["tuned"]["accuracy"] == 1.0
    shutil.copytree(run.path, tmp_path / "plain", ignore=shutil.ignore_patterns("record.json"))
    for folder in (run.path, tmp_path / "plain"):
        rows = [{**row, "label": ("bad", "good").index(row["label"])} for row in moods(20)]
        rows = moods(20) if folder == run.path else rows
        assert evaluate(open_run(str(folder), dtype="fp32"), rows)["accuracy"] == 1.0


def test_layer_before_a_head_that_has_been_trained(tmp_path: Path) -> None:
    """It trains whole as the head does: dropout has no masks for the one vector of each row that it sees."""
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    config = DistilBertConfig(vocab_size=400, dim=32, n_layers=1, n_heads=4, hidden_dim=64, pad_token_id=2, **names)
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer(None, bos="<|begin_of_text|>", adds_bos=True).save_pretrained(tmp_path / "base")
    settings = {**LEARN, "max_steps": 2, "dropout": 0.1}
    run = train(str(tmp_path / "base"), moods(20), out=str(tmp_path / "run"), **settings)
    assert {one["name"] for one in run.record["adapter"]["replaced"]} >= {"pre_classifier.weight", "classifier.weight"}
    assert run.record["settings"]["task_type"]["reason"] == "DistilBertForSequenceClassification is made for it"


def test_loaded_model_without_the_head_is_refused(tmp_path: Path) -> None:
    model = encoder(kind="BertForSequenceClassification", num_labels=3)
    act = lambda: train(model, moods(8), tokenizer=tiny_tokenizer(None), out=str(tmp_path / "run"))  # noqa: E731
    assert problems(ConfigError, act) == ["the loaded BertForSequenceClassification tells 3 labels apart, the rows 2"]
    act = lambda: train(tiny("llama"), moods(8), task="SEQ_CLS", out=str(tmp_path / "run"))  # noqa: E731
    assert "has no head for it" in problems(ConfigError, act)[0]


WORDS = {"B-x": "dog", "O": "fine"}


def tagged(count: int) -> list[dict[str, list[str]]]:
    """Words of which each has the tag that it always has."""
    tags = [[("O", "B-x")[(n * 7 + i * i) % 2] for i in range(3 + n % 4)] for n in range(count)]
    return [{"tokens": [WORDS[tag] for tag in row], "tags": row} for row in tags]


def matched(count: int) -> list[dict[str, str]]:
    """Pairs that a tiny encoder can learn to put together."""
    kinds = (("fine thank you", "Hello"), ("lazy dog", "stop"), ("capital", "Paris"))
    return [{"anchor": f"{kinds[n % 3][0]} {n}", "positive": kinds[n % 3][1]} for n in range(count)]


@pytest.mark.parametrize(
    ("task", "rows", "unit", "metric"),
    [
        ("TOKEN_CLS", tagged(40), "words", "span_f1"),
        ("FEATURE_EXTRACTION", matched(40), "pairs", "mrr"),
    ],
)
def test_other_tasks_of_an_encoder(
    task: str, rows: list[Any], unit: str, metric: str, bert: str, tmp_path: Path
) -> None:
    run = train(bert, rows, out=str(tmp_path / "run"), **LEARN)
    record = run.record
    assert (record["task"]["type"], record["task"]["unit"]) == (task, unit)
    assert all(check["passed"] for check in record["checks"])
    metrics = record["result"]["metrics"]
    assert metrics["tuned"][metric] == 1.0
    assert metrics["base"][metric] < 0.9
    opened = open_run(str(run.path))
    assert opened.lora is not None
    found = evaluate(opened, rows)
    assert found[metric] == 1.0
    assert found[f"supervised_{unit}"] == (sum(len(row["tokens"]) for row in rows) if unit == "words" else len(rows))
    with opened.lora.disabled():
        assert evaluate(opened, rows)[metric] < 0.9
    samples = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert [s["tuned"] for s in samples] == [s["reference"] for s in samples]
    theirs = peft.PeftModel.from_pretrained(
        opened.base.head.auto.from_pretrained(bert, **opened.base.head.config()), run.path
    )
    inputs = opened.base.tokenizer(["fine dog stop"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(opened.base.model(**inputs)[0], theirs.eval()(**inputs)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_head_of_a_base_in_few_bits_stays_whole(family: str, bert: str, tmp_path: Path) -> None:
    """It trains whole, which codes cannot."""
    base = bert if family == "encoder" else str(saved(tmp_path / "llama"))
    settings = {**LEARN, "max_steps": 2, "task_type": "SEQ_CLS", "quant": "int8"}
    run = train(base, moods(24), out=str(tmp_path / "run"), **settings)
    assert run.record["base"]["quant"] == "int8"
    whole = {part["name"].partition(".")[0] for part in run.record["adapter"]["replaced"]}
    assert whole == {"classifier" if family == "encoder" else "score"}


def test_pads_are_those_that_the_model_knows(tmp_path: Path) -> None:
    """A decoder looks for the last token that is no pad of its config: another one would be read as text."""
    model = tiny("llama", pad_token_id=7)
    base = base_of(LlamaForSequenceClassification(model.config).eval(), tiny_tokenizer(), Head("SEQ_CLS", ("a", "b")))
    assert base.tokenizer.pad_token_id != base.pad_id == 7
    short = Labelled((9, 10, 11), (), Place("rows", 1), truncated=False, targets=(0,))
    long = Labelled(tuple(range(9, 17)), (), Place("rows", 2), truncated=False, targets=(1,))
    with torch.no_grad():
        (together,) = batches([short, long], Layout.PADDED, limit=99, pad_id=base.pad_id)
        (alone,) = batches([short], Layout.PADDED, limit=99, pad_id=base.pad_id)
        found, expected = logits_of(base.model, together), logits_of(base.model, alone)
    torch.testing.assert_close(found[1:], expected)  # the longest comes first


def test_a_pad_is_named_that_no_text_holds(tmp_path: Path) -> None:
    """Without one the end of a text, and not token 0, which is a "!" in some vocabularies."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    folder = saved(tmp_path / "llama", tokenizer=tokenizer, pad_token_id=None)
    base = load_base(str(folder), dtype="fp32", device="cpu", head=Head("SEQ_CLS", ("a", "b")))
    assert base.pad_id == base.model.config.pad_token_id == tokenizer.eos_token_id != 0


def test_families_that_make_no_decoder_inputs(tmp_path: Path) -> None:
    """M2M100, and NLLB with it, leaves the shift to the loss."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 1, "pad_token_id": 2}
    config = M2M100Config(vocab_size=60, **sizes, **heads, dropout=0.0)
    model = M2M100ForConditionalGeneration(config).eval()
    assert not hasattr(model, "prepare_decoder_input_ids_from_labels")
    ids, written = (9, 10, 11, 20, 21, 22), (False,) * 3 + (True,) * 3
    row = Translated(ids, written, Place("rows", 1), truncated=False, border=3)
    (batch,) = batches([row], Layout.PADDED, limit=99, pad_id=2)
    labels = torch.tensor([[20, 21, 22]])
    expected = model(input_ids=torch.tensor([[9, 10, 11]]), labels=labels).loss * 3
    assert float(summed_loss(model, batch)) == pytest.approx(float(expected), rel=1e-5)
