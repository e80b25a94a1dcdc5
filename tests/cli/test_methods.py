"""Every kind of adapter through the whole of `train`: its self-checks pass, and its folder opens again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import QUICK, Cli
from tests.models import saved
from tests.tiny import LLAMA3, tiny_tokenizer

# Options → settings that the record must hold.
KINDS: dict[tuple[str, ...], dict[str, object]] = {
    ("--method=dora",): {"use_dora": True},
    ("--method=pissa",): {"init_lora_weights": "pissa"},
    ("--init=olora", "--rslora"): {"init_lora_weights": "olora", "use_rslora": True},
    ("--init=orthogonal",): {"init_lora_weights": "orthogonal"},
    ("--init=swapped", "--save-modules=lm_head,norm"): {"modules_to_save": ["lm_head", "norm"]},
    ("--bias=all", "--targets=c_attn,c_fc"): {"bias": "all"},
}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(saved(tmp_path_factory.mktemp("gpt2") / "model", "gpt2"))


@pytest.mark.parametrize("options", KINDS, ids=" ".join)
def test_train_then_eval_then_merge(
    cli: Cli, base: str, gpt2: str, data: str, tmp_path: Path, options: tuple[str, ...], fast: None
) -> None:
    model = gpt2 if "--bias=all" in options else base  # a Llama has no biases
    run = tmp_path / "run"
    said = cli("train", model, data, "--out", run, *QUICK, *options, "--json")
    assert said.code == 0, said.err
    record = said.json["record"]
    assert {name: record["settings"][name]["value"] for name in KINDS[options]} == KINDS[options]
    checks = {check["name"]: check["passed"] for check in record["checks"]}
    assert all(checks.values())
    assert {"step 0 ≡ base", "every B moved", "reload ≡ live", "merged ≡ adapter"} <= set(checks)
    loss = cli("eval", run, "--data", data, "--json").json
    assert loss["run"]["loss"] < loss["base"]["loss"]
    assert cli("merge", run, "--out", tmp_path / "merged").code == 0
    merged = cli("eval", tmp_path / "merged", "--data", data, "--json").json
    # A plain model is measured in bf16 where the machine has it; the run's own dtype is fp32.
    assert merged["run"]["loss"] == pytest.approx(loss["run"]["loss"], abs=1e-2)


def test_a_method_and_a_setting_that_contradict(cli: Cli, base: str, data: str, tmp_path: Path) -> None:
    said = cli("train", base, data, "--out", tmp_path / "run", "--method=dora", "--no-dora")
    assert said.code == 2
    assert "use_dora=False contradicts method='dora'" in said.err
    assert not (tmp_path / "run").exists()


def test_what_is_saved_whole_is_counted(cli: Cli, base: str, data: str) -> None:
    words = ("plan", base, data, "--rank=4", "--json")
    plain, whole = (cli(*words, *more).json["adapter"] for more in ((), ("--save-modules=lm_head",)))
    assert whole["replaced"] == [{"name": "lm_head.weight", "count": 1, "parameters": 400 * 32}]
    assert whole["trainable"] == plain["trainable"] + 400 * 32
    assert "lm_head.weight" in cli("plan", base, data, "--save-modules=lm_head").out


def test_another_tokenizer_only_when_told(cli: Cli, base: str, data: str, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    tiny_tokenizer(LLAMA3, bos="<|begin_of_text|>").save_pretrained(tmp_path / "base")
    words = ("eval", finished, "--data", data, "--base", tmp_path / "base", "--loss=completion")
    said = cli(*words, "--json")
    assert said.code == 1
    assert "--any-tokenizer" in json.loads(said.out)["error"]["hint"]
    assert cli(*words, "--any-tokenizer").code == 0
