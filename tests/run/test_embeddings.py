"""Runs that adapt embeddings: every check of a run holds for them, and what a run leaves can be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratune.errors import AdapterFileError, RunInterrupted
from loratune.run import export
from tests.models import saved
from tests.run.conftest import opened_and_changing
from tests.run.test_resume import adapter_bytes, stop_at

Quick = Callable[..., Any]
CHANGES: dict[str, dict[str, Any]] = {
    "dropout and quantised": {"lora_dropout": 0.1, "quant": "nf4"},
    "dora": {"use_dora": True},
    "tied": {"family": "gemma3"},
}


@pytest.mark.parametrize("case", CHANGES)
def test_its_checks_hold(quick: Quick, tmp_path: Path, case: str) -> None:
    changes = dict(CHANGES[case])
    if "family" in changes:
        changes["model"] = str(saved(tmp_path / "base", changes.pop("family"), tie_word_embeddings=True))
    run = quick(tmp_path / "run", target_modules=("embed_tokens", "q_proj"), **changes)
    assert run.record["state"] == "finished"
    assert [check for check in run.record["checks"] if not check["passed"]] == []
    shown = {module["name"]: module for module in run.record["adapter"]["modules"]}
    assert shown["embed_tokens"]["each"] == 4 * (400 + 32) + (32 if case == "dora" else 0)
    opened_and_changing(run, [5, 6, 7, 8])


@pytest.mark.parametrize(("family", "quant"), [("llama", None), ("gemma3", "int8")])
def test_rows_of_tokens_alone(quick: Quick, tmp_path: Path, family: str, quant: str | None) -> None:
    base = str(saved(tmp_path / "base", family, tie_word_embeddings=family == "gemma3"))
    tokens = (1, 16, 17, 18)  # the end of a turn, and digits
    run = quick(tmp_path / "run", model=base, trainable_token_indices=tokens, quant=quant)
    assert [check for check in run.record["checks"] if not check["passed"]] == []
    assert {"name": "embed_tokens, 4 rows", "count": 1, "parameters": 4 * 32} in run.record["adapter"]["replaced"]
    model, lora = opened_and_changing(run, [1, 16, 17, 18])
    (rows,) = [own for name, own in lora.replaced().items() if "embed_tokens" in name]
    assert (rows != model.get_input_embeddings()._parameters["weight"][list(tokens)]).any()


@pytest.mark.full
def test_a_run_with_rows_of_tokens_goes_on_where_it_stopped(quick: Quick, tmp_path: Path) -> None:
    settings = {"trainable_token_indices": (1, 16, 17), "checks": "off"}
    quick(tmp_path / "whole", **settings)
    with pytest.raises(RunInterrupted):
        quick(tmp_path / "broken", **settings, listen=stop_at(2))
    quick(tmp_path / "broken", **settings)
    assert adapter_bytes(tmp_path / "broken") == adapter_bytes(tmp_path / "whole")


def test_readers_that_take_linear_layers_alone_are_not_given_it(quick: Quick, tmp_path: Path) -> None:
    run = quick(tmp_path / "run", target_modules=("embed_tokens", "q_proj"), max_steps=2)
    with pytest.raises(AdapterFileError, match=r"given linear layers alone, no embedding .*: model\.embed_tokens"):
        export(str(run.path), str(tmp_path / "out"), to="vllm")
