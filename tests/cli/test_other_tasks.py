"""Adapters of models that do not write: what only a writing one does is refused, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import loratune as lt
from tests.cli.conftest import Cli
from tests.models import saved, saved_t5, write_jsonl
from tests.tiny import tiny_tokenizer

# Task → the class that its base is loaded with, of which GPT-2 has all but the last one.
CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases that could be served, or hold the whole of an encoder-decoder, and an adapter of each task."""
    folder = tmp_path_factory.mktemp("tasks")
    saved(folder / "decoder", "gpt2", tokenizer=tiny_tokenizer(None))
    saved_t5(folder / "pair")
    for task, name in CLASSES.items():
        base = folder / ("pair" if task == "SEQ_2_SEQ_LM" else "decoder")
        model: Any = getattr(transformers, name).from_pretrained(base)
        lora = lt.attach(model, lt.LoraConfig(r=2, task_type=task))
        with torch.no_grad():
            for parameter in lora.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        lora.save(folder / task)
    return folder


def commands(folder: Path, task: str, out: Path) -> dict[str, tuple[object, ...]]:
    run, base = folder / task, folder / ("pair" if task == "SEQ_2_SEQ_LM" else "decoder")
    prompts = write_jsonl(out / "prompts.jsonl", [{"prompt": "Hello"}])
    return {
        "serve": ("serve", folder / "decoder", run, "--port", 0),
        "chat": ("chat", run, "--base", base),
        "generate": ("generate", run, "--prompts", prompts, "--base", base),
        "vllm": ("export", run, "--to", "vllm", "--out", out / "out", "--base", base),
        "gguf": ("export", run, "--to", "gguf", "--out", out / "out", "--base", base),
        "merged": ("export", run, "--to", "gguf", "--merged", "--out", out / "out", "--base", base),
    }


@pytest.mark.parametrize("what", ["serve", "chat", "generate", "vllm", "gguf", "merged"])
@pytest.mark.parametrize("task", CLASSES)
def test_refused(folders: Path, cli: Cli, tmp_path: Path, task: str, what: str) -> None:
    said = cli(*commands(folders, task, tmp_path)[what])
    assert said.code == 2
    assert f"needs a model that writes, and this one is for {task}" in " ".join(said.err.split())
    assert not (tmp_path / "out").exists()
