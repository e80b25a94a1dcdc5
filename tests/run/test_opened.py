"""A run opened again: generate, evaluate, merge, show; and what does not belong together is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratune.data.example import Example
from loratune.data.read import read
from loratune.data.render import render
from loratune.engine import Sampling
from loratune.errors import AdapterFileError, AdapterStateError, CheckError, DataError, ModelError, RunFolderError
from loratune.run.answer import evaluate, generate
from loratune.run.conversation import Conversation
from loratune.run.merge import merge
from loratune.run.opened import open_run
from loratune.run.show import show
from tests.models import additions, saved, tiny
from tests.oracle.loss import step_loss
from tests.tiny import LLAMA3, tiny_tokenizer

Quick = Callable[..., Any]
IDS = torch.arange(3, 40)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits
    return out


def examples(data: str) -> tuple[Example, ...]:
    return read(data).examples


def test_run_opens_with_its_adapter(finished: Path, base: str) -> None:
    opened = open_run(str(finished))
    assert opened.base.name == base
    assert opened.lora is not None
    assert opened.lora.active == ("default",)
    assert opened.record is not None
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    assert (logits(opened.base.model) - plain).abs().max() > 0.1
    with opened.lora.disabled():
        torch.testing.assert_close(logits(opened.base.model), plain, rtol=1e-5, atol=1e-5)


def test_adapter_folder_without_a_record(finished: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(finished / name, tmp_path)
    opened = open_run(str(tmp_path), dtype="fp32")
    assert opened.record is None
    torch.testing.assert_close(logits(opened.base.model), logits(open_run(str(finished)).base.model))


def test_bare_model(base: str) -> None:
    opened = open_run(base, dtype="fp32")
    assert (opened.lora, opened.record) == (None, None)


def test_unfinished_run(tmp_path: Path, quick: Quick) -> None:
    with pytest.raises(ZeroDivisionError):
        quick(tmp_path / "run", listen=lambda event: 1 / 0 if hasattr(event, "loss") else None)
    with pytest.raises(AdapterFileError, match="a run without an adapter yet"):
        open_run(str(tmp_path / "run"))


def test_base_that_moved(finished: Path, base: str, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(base, moved)
    torch.testing.assert_close(
        logits(open_run(str(finished), base=str(moved)).base.model), logits(open_run(str(finished)).base.model)
    )
    record = json.loads((finished / "record.json").read_text())
    shutil.copytree(finished, tmp_path / "run")
    record["base"]["name"] = str(tmp_path / "gone")
    (tmp_path / "run" / "record.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match="no such model folder"):
        open_run(str(tmp_path / "run"))


def test_another_base_is_refused(finished: Path, other_base: str) -> None:
    with pytest.raises(AdapterFileError, match="has other weights"):
        open_run(str(finished), base=other_base)


def test_another_tokenizer_is_refused(finished: Path, base: str, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    tiny_tokenizer(LLAMA3, bos="<|begin_of_text|>").save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterFileError) as caught:
        open_run(str(finished), base=str(tmp_path / "base"))
    assert "another tokenizer" in str(caught.value)
    assert "another chat template" in str(caught.value)
    assert open_run(str(finished), base=str(tmp_path / "base"), any_tokenizer=True).lora is not None


def test_adapter_of_another_shape_is_refused(finished: Path, tmp_path: Path) -> None:
    narrow = saved(tmp_path / "narrow", num_hidden_layers=1)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(finished / name, tmp_path)
    with pytest.raises(AdapterFileError, match=r"layers\.1\.self_attn\.q_proj"):
        open_run(str(tmp_path), base=str(narrow))


def test_generate(finished: Path, data: str) -> None:
    opened = open_run(str(finished))
    finished_rows: list[int] = []
    rows = generate(opened, examples(data)[:5], Sampling(max_new_tokens=4), batch_size=2, done=finished_rows.append)
    assert [row["place"] for row in rows] == [f"sums.jsonl:{n}" for n in range(1, 6)]
    assert [row["reference"] for row in rows] == ["1", "3", "5", "7", "9"]
    assert all(set(row) == {"place", "prompt", "reference", "output", "stopped", "tokens"} for row in rows)
    assert all(row["tokens"] <= 4 for row in rows)
    assert sum(finished_rows) == 5
    alone = [generate(opened, [example], Sampling(max_new_tokens=4))[0] for example in examples(data)[:5]]
    assert alone == rows


def test_evaluate_against_the_oracle(finished: Path, base: str, data: str) -> None:
    opened = open_run(str(finished))
    found = evaluate(opened, data)
    rows = render(examples(data), AutoTokenizer.from_pretrained(base), max_length=128).rows
    assert (found["rows"], found["dropped"]) == (24, 0)
    assert found["supervised_tokens"] == sum(sum(row.supervised) for row in rows)
    oracle = float(step_loss(opened.base.model.double(), rows))
    assert found["loss"] == pytest.approx(oracle, rel=1e-5)
    assert found["perplexity"] == pytest.approx(2.718281828459045**oracle, rel=1e-4)


def test_evaluate_counts_exact_answers(finished: Path, data: str) -> None:
    opened = open_run(str(finished))
    answers = [row["output"] for row in generate(opened, examples(data)[:4], Sampling(max_new_tokens=4))]
    rows = additions(4)
    rows[0]["completion"], rows[2]["completion"] = answers[0] or "?", answers[2] or "?"
    right = sum(row["completion"].strip() == answer.strip() for row, answer in zip(rows, answers, strict=True))
    found = evaluate(opened, rows, answers=4, sampling=Sampling(max_new_tokens=4))
    assert right > 0
    assert (found["answered"], found["exact_match"]) == (4, right / 4)


def test_evaluate_refuses_unknown_settings_and_bad_rows(finished: Path) -> None:
    opened = open_run(str(finished))
    with pytest.raises(DataError):
        evaluate(opened, [{"prompt": "no answer"}])


def test_merge_loads_in_transformers(finished: Path, tmp_path: Path) -> None:
    opened = open_run(str(finished))
    assert opened.lora is not None
    live = logits(opened.base.model)
    found = merge(opened, str(tmp_path / "merged"))
    assert found["out"] == str(tmp_path / "merged")
    # The opened run goes on as it was.
    assert not opened.lora.merged
    assert torch.equal(logits(opened.base.model), live)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), live, rtol=1e-4, atol=1e-4)
    assert not [name for name in merged.state_dict() if "lora" in name]
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_merge_with_tied_embeddings(quick: Quick, tmp_path: Path) -> None:
    """Tied weights that no adapter touches stay tied in the merged folder."""
    folder = saved(tmp_path / "tied", tie_word_embeddings=True)
    run = quick(tmp_path / "run", model=str(folder), checks="off", samples=0)
    opened = open_run(str(run.path))
    live = logits(opened.base.model)
    merge(opened, str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(logits(merged), live, rtol=1e-4, atol=1e-4)


def test_merge_refuses(finished: Path, base: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="exists already"):
        merge(open_run(str(finished)), str(tmp_path / "full"))
    with pytest.raises(RunFolderError, match=r"a.udcff' is not UTF-8"):
        merge(open_run(str(finished)), str(tmp_path / "a\udcff"))
    with pytest.raises(AdapterStateError, match="no adapter to merge"):
        merge(open_run(base, dtype="fp32"), str(tmp_path / "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_wrong_merge_is_not_written(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratune.lora import LowRank

    right = LowRank.delta
    monkeypatch.setattr(LowRank, "delta", lambda self, dtype=torch.float32: right(self, dtype) / 2)
    with pytest.raises(CheckError, match="merged ≡ adapter"):
        merge(open_run(str(finished)), str(tmp_path / "merged"))
    assert list(tmp_path.iterdir()) == []


def test_show(finished: Path) -> None:
    found = show(str(finished))
    assert found["parameters"] == 4096
    assert found["record"]["state"] == "finished"
    assert found["config"]["r"] == 4
    assert len(found["layers"]) == 14
    opened = open_run(str(finished))
    assert opened.lora is not None
    low_rank = opened.lora.factors()["model.layers.1.mlp.up_proj"]
    layer = next(layer for layer in found["layers"] if layer["path"] == "model.layers.1.mlp.up_proj")
    zeros = torch.zeros(low_rank.B.shape[0], low_rank.A.shape[1], dtype=torch.float64)
    sigma = torch.linalg.svdvals(low_rank.delta(zeros))
    assert layer["norm"] == pytest.approx(float(sigma.norm()), rel=1e-5)
    assert layer["largest"] == pytest.approx(float(sigma[0]), rel=1e-5)
    assert layer["parameters"] == 4 * (32 + 64)
    assert 1 <= layer["effective_rank"] <= 4


def test_conversation_side_by_side(finished: Path) -> None:
    talk = Conversation.open(
        str(finished), vs="base", base=None, device=None, system="Be brief.", sampling=Sampling(max_new_tokens=3)
    )
    (base_name, base_answer), (run_name, _) = talk.say("2 + 3 =")
    assert (base_name, run_name) == ("base", str(finished))
    for speaker in talk.speakers:
        assert [message["role"] for message in speaker.messages] == ["system", "user", "assistant"]
    untouched = Conversation.open(
        str(open_run(str(finished)).base.name),
        vs=None,
        base=None,
        device=None,
        system="Be brief.",
        sampling=Sampling(max_new_tokens=3),
    )
    assert untouched.say("2 + 3 =")[0][1].ids == base_answer.ids
    talk.forget()
    assert [[message["role"] for message in speaker.messages] for speaker in talk.speakers] == [["system"], ["system"]]


def test_run_of_a_loaded_model_needs_its_base_named(quick: Quick, tmp_path: Path, base: str) -> None:
    model = tiny()
    run = quick(tmp_path / "run", model=model, tokenizer=tiny_tokenizer(), samples=0)
    opened = open_run(str(run.path), base=base)
    assert opened.lora is not None
    with pytest.raises(ModelError):
        open_run(str(run.path))
