"""`loratune data` on rows of every task: what they are taken for, what they teach, and an example of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli
from tests.models import saved, saved_encoder, saved_t5, write_jsonl
from tests.tiny import tiny_tokenizer

ANSWERS = {"text": ["Paris", "Paris"], "answer_start": [0, 9]}
ROWS: dict[str, list[dict[str, Any]]] = {
    "SEQ_CLS": [{"text": f"fine {n}", "label": ("bad", "good", "bad")[n % 3], "from": "x"} for n in range(6)],
    "TOKEN_CLS": [{"tokens": ["Berlin", "is", "fine"], "tags": ["B-x", "O", "O"]}] * 6,
    "QUESTION_ANS": [
        *[{"question": "Where?", "context": "Paris or Paris", "answers": ANSWERS}] * 5,
        {"question": "Who?", "context": "nobody here", "answers": {"text": [], "answer_start": []}},
    ],
    "FEATURE_EXTRACTION": [{"anchor": f"fine {n}", "positive": "thank you"} for n in range(6)],
    "SEQ_2_SEQ_LM": [{"prompt": "fine", "completion": "thank you"}] * 6,
}
# Task → the columns, what is counted, what the first row is said to teach, and which of its text is coloured.
EXPECTED: dict[str, tuple[list[str], dict[str, Any], str, list[str]]] = {
    "SEQ_CLS": (["label", "text"], {"labels": {"bad": 4, "good": 2}}, "bad", []),
    "TOKEN_CLS": (["tags", "tokens"], {"labels": {"B-x": 6, "O": 12}}, "Berlin/B-x is/O fine/O", []),
    "QUESTION_ANS": (
        ["answers", "context", "question"],
        {"windows": 6, "in_several_windows": 0, "without_answer": 1, "with_several_answers": 5},
        "Paris",
        ["Paris"],
    ),
    "FEATURE_EXTRACTION": (["anchor", "positive"], {}, "", ["<|begin_of_text|>thank you"]),
    "SEQ_2_SEQ_LM": (["completion", "prompt"], {}, "", ["thank you<|im_end|>"]),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    encoder, pair = saved_encoder(folder / "bert"), saved_t5(folder / "t5")
    saved(folder / "llama", tokenizer=tiny_tokenizer(None))
    return {"encoder": encoder, "decoder": folder / "llama", "pair": pair}


@pytest.mark.parametrize("task", ROWS)
def test_rows_are_shown_as_they_teach(task: str, bases: dict[str, Path], cli: Cli, tmp_path: Path) -> None:
    """The task is found from the model and the rows, as `train` finds it."""
    base = bases["pair" if task == "SEQ_2_SEQ_LM" else "encoder"]
    columns, facts, said, coloured = EXPECTED[task]
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS[task])
    asked = ("data", path, "--model", base, "--show-mask", 1, "--val", 0)
    found = cli(*asked, "--json").json
    assert (found["task"]["type"], found["rows"], found["train"]) == (task, 6, 6)
    assert found["taught"] == facts
    assert found["columns"] == columns
    assert found["ignored_columns"] == (["from"] if task == "SEQ_CLS" else [])
    (mask,) = found["masks"]
    assert mask["said"] == said
    pieces = [piece.strip() for piece, supervised in mask["pieces"] if supervised]
    assert task == "TOKEN_CLS" or pieces == coloured
    text = cli(*asked).out
    assert f"task: {task} (" in text
    assert f"columns: {', '.join(columns)}" in text
    assert (f"→ {said}" in text) == bool(said)
    for name, count in facts.get("labels", {}).items():
        assert f"{name} {count}" in text
    if task == "QUESTION_ANS":
        assert "12 ends to learn · 6 windows · 1 without answer · 5 with several answers" in text


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_the_task_can_be_told(task: str, bases: dict[str, Path], cli: Cli, tmp_path: Path) -> None:
    """A decoder's rows are conversations, whatever their columns are."""
    base = bases["decoder"] if task != "QUESTION_ANS" else bases["encoder"]
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS[task])
    found = cli("data", path, "--model", base, "--task", task, "--json").json
    assert found["task"] == {"type": task, "reason": "given", "unit": found["task"]["unit"]}
    assert found["taught"] == EXPECTED[task][1]
    if task == "SEQ_CLS":
        assert cli("data", path, "--model", base, "--json").json["task"]["type"] == "CAUSAL_LM"


def test_a_window_without_the_answer_says_so(bases: dict[str, Path], cli: Cli, tmp_path: Path) -> None:
    long = {"question": "Where?", "context": "fine " * 30 + "Paris", "answer": "Paris", "answer_start": 150}
    path = write_jsonl(tmp_path / "rows.jsonl", [long] * 2)
    asked = ("data", path, "--model", bases["encoder"], "--max-length", 40, "--show-mask", 99)
    masks = cli(*asked, "--json").json["masks"]
    assert masks[0]["said"] == "no answer in this window"
    assert masks[-1]["said"] == "Paris"


def test_rows_of_another_task_are_refused(bases: dict[str, Path], cli: Cli, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS["SEQ_CLS"])
    said = cli("data", path, "--model", bases["encoder"], "--task", "QUESTION_ANS")
    assert said.code == 3
    assert "no known shape has the columns 'from', 'label', 'text'" in said.err
    assert cli("data", path, "--model", bases["encoder"], "--task", "QA").code == 2
