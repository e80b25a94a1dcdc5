"""Every command: what it prints for people, and that `--json` prints one JSON value and nothing else."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.cli.conftest import QUICK, Cli
from tests.models import additions, write_jsonl


def test_train(cli: Cli, base: str, data: str, tmp_path: Path) -> None:
    said = cli("train", base, data, "--out", tmp_path / "run", *QUICK)
    assert (said.code, said.out) == (0, f"{tmp_path / 'run'}\n")
    for words in (
        "data    24 rows · prompt/completion · 2 held out",
        "plan    r=4 α=8",
        "checks  ✓ step 0 ≡ base",
        "        ✓ one batch overfits",
        "1/6     loss ",
        "6/6     val ",
        "verify  ✓ every B moved (14/14 B moved)",
        "        ✓ merged ≡ adapter",
        f"saved   {tmp_path / 'run'}    next: loratune chat {tmp_path / 'run'} --vs base",
    ):
        assert words in said.err, said.err
    assert "\x1b" not in said.err
    assert (tmp_path / "run" / "report.html").is_file()


def test_train_json(cli: Cli, base: str, data: str, tmp_path: Path, fast: None) -> None:
    said = cli("train", base, data, "--out", tmp_path / "run", "--json", *QUICK)
    assert said.code == 0
    assert said.json["path"] == str(tmp_path / "run")
    assert said.json["record"] == json.loads((tmp_path / "run" / "record.json").read_text())
    assert "verify" in said.err


def test_train_again_says_finished(cli: Cli, base: str, data: str, finished: Path) -> None:
    said = cli("train", base, data, "--out", finished, *QUICK)
    assert said.code == 0
    assert "finished already; nothing was done" in said.err


def test_dry_run_writes_nothing(
    cli: Cli, base: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in ((), ("--out", tmp_path / "run")):
        said = cli("train", base, data, "--dry-run", *words, *QUICK)
        assert said.code == 0
        assert "r=4 α=8 · trainable 4,096 of 48,288" in said.out
        assert "6 steps" in said.out
        assert list(tmp_path.iterdir()) == []
    said = cli("train", base, data, "--dry-run", "--json", *QUICK)
    assert said.json["steps"] == 6
    assert list(tmp_path.iterdir()) == []


def test_dry_run_refuses_as_the_run_does(cli: Cli, base: str, data: str) -> None:
    assert cli("train", base, data, "--dry-run", "--targets", "q_prj").code == 2
    assert cli("train", base, data + ".gone", "--dry-run").code == 3


def test_data(cli: Cli, base: str, data: str) -> None:
    said = cli("data", data, "--model", base, "--show-mask", 2)
    assert said.code == 0
    assert "24 rows · prompt/completion · 2 held out" in said.out
    assert "22 to train on, 2 held out" in said.out
    assert "sums.jsonl:" in said.out
    found = cli("data", data, "--model", base, "--show-mask", 2, "--json").json
    assert (found["rows"], found["train"], found["val"]) == (24, 22, 2)
    assert len(found["masks"]) == 2
    for mask in found["masks"]:
        learned = "".join(piece for piece, supervised in mask["pieces"] if supervised)
        assert learned.removesuffix("<|im_end|>").isdigit()
        assert learned.endswith("<|im_end|>")


def test_data_splits_as_train_does(cli: Cli, base: str, data: str) -> None:
    found = cli("data", data, "--model", base, "--val", "0.25", "--seed", 3, "--json").json
    assert (found["train"], found["val"]) == (18, 6)


def test_plan(cli: Cli, base: str, data: str) -> None:
    said = cli("plan", base, data, "--rank", 4)
    assert said.code == 0
    assert "trainable 4,096 of 48,288 (8.48%)" in said.out
    assert "memory" in said.out
    assert "--shard on, 8 processes:" in said.out
    found = cli("plan", base, data, "--rank", 4, "--json").json
    assert sum(module["parameters"] for module in found["adapter"]["modules"]) == 4096
    assert found["base_parameters"] == 44_192
    parts = ("base", "constants", "adapter", "activations", "working")
    assert found["memory"]["total"] == sum(found["memory"][part] for part in parts)
    assert found["sharded"]["2"] > found["sharded"]["8"] > found["memory"]["activations"]


def test_plan_without_data_or_weights(cli: Cli, base: str, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "config-only")
    (tmp_path / "config-only" / "model.safetensors").unlink()
    found = cli("plan", tmp_path / "config-only", "--targets", "q_proj", "--json").json
    # Two layers, r (32 + 32) each, at rank 8.
    assert found["adapter"]["trainable"] == 2 * 8 * 64
    assert "steps" not in found


def test_generate(cli: Cli, finished: Path, data: str, tmp_path: Path) -> None:
    said = cli("generate", finished, "--prompts", data, "--limit", 3, "--max-new-tokens", 4)
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [row["reference"] for row in rows] == ["1", "3", "5"]
    as_json = cli("generate", finished, "--prompts", data, "--limit", 3, "--max-new-tokens", 4, "--json").json
    assert as_json == {"out": None, "rows": rows}
    out = tmp_path / "answers.jsonl"
    said = cli("generate", finished, "--prompts", data, "--limit", 3, "--max-new-tokens", 4, "--out", out, "--json")
    assert said.json == {"out": str(out), "rows": 3}
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows


def test_generate_from_prompts_without_answers(cli: Cli, finished: Path, tmp_path: Path) -> None:
    words = ("generate", finished, "--max-new-tokens", 2, "--prompts")
    text, rows, named = tmp_path / "a.txt", tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    text.write_text("2 + 3 =\n4 + 5 =\n")
    write_jsonl(rows, [{"prompt": "2 + 3 =", "id": 7}, {"prompt": "4 + 5 =", "completion": "9"}])
    write_jsonl(named, [{"q": "2 + 3 ="}, {"q": "4 + 5 ="}])
    from_text = [json.loads(line) for line in cli(*words, text).out.splitlines()]
    found = [json.loads(line) for line in cli(*words, rows).out.splitlines()]
    from_named = [json.loads(line) for line in cli(*words, named, "--columns", "prompt=q").out.splitlines()]
    assert [row["reference"] for row in from_text] == [None, None]
    assert ([row["reference"] for row in found], found[0]["id"], "id" in found[1]) == ([None, "9"], 7, False)
    said = [[(row["prompt"], row["output"]) for row in rows] for rows in (from_text, found, from_named)]
    assert said[0] == said[1] == said[2]
    assert all("2 + 3 =<|im_end|>" in answers[0][0] for answers in said)


def test_sampling_repeats_with_its_seed(cli: Cli, finished: Path, data: str) -> None:
    words = ("generate", finished, "--prompts", data, "--limit", 2, "--max-new-tokens", 6, "--temperature", "1.5")
    first = cli(*words).out
    assert cli(*words).out == first
    assert cli(*words, "--seed", 1).out != first


def test_eval(cli: Cli, finished: Path, data: str) -> None:
    said = cli("eval", finished, "--data", data)
    assert said.code == 0
    for word in ("run", "base", "perplexity", "supervised_tokens"):
        assert word in said.out
    found = cli("eval", finished, "--data", data, "--answers", 2, "--max-new-tokens", 4, "--json").json
    assert found["run"]["loss"] < found["base"]["loss"]
    assert found["run"]["answered"] == 2
    assert set(cli("eval", finished, "--data", data, "--no-vs-base", "--json").json) == {"run"}


def test_merge(cli: Cli, finished: Path, tmp_path: Path) -> None:
    said = cli("merge", finished, "--out", tmp_path / "a")
    assert (said.code, said.err) == (0, "")
    assert "merged ≡ adapter" in said.out
    found = cli("merge", finished, "--out", tmp_path / "b", "--json").json
    assert found["out"] == str(tmp_path / "b")
    AutoModelForCausalLM.from_pretrained(tmp_path / "b")


def test_show(cli: Cli, finished: Path) -> None:
    said = cli("show", finished)
    assert "model.layers.0.self_attn.q_proj" in said.out
    assert "4,096 parameters" in said.out
    assert cli("show", finished, "--json").json["parameters"] == 4096


def test_report(cli: Cli, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    assert cli("report", tmp_path / "run", "--json").json == {"report": str(tmp_path / "run" / "report.html")}
    assert (tmp_path / "run" / "report.html").is_file()


def test_chat(cli: Cli, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("2 + 3 =\n\n/new\n4 + 5 =\n"))
    said = cli("chat", finished, "--vs", "base", "--max-new-tokens", 3, "--json")
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert [line["message"] for line in lines] == ["2 + 3 =", "4 + 5 ="]
    assert [answer["from"] for answer in lines[0]["answers"]] == ["base", str(finished)]
    monkeypatch.setattr("sys.stdin", io.StringIO("2 + 3 =\n/quit\nnever\n"))
    said = cli("chat", finished, "--max-new-tokens", 3)
    assert said.code == 0
    assert said.out.strip() == lines[0]["answers"][1]["text"].strip()
    monkeypatch.setattr("sys.stdin", io.StringIO("2 + 3 =\n"))
    said = cli("chat", finished, "--vs", finished, "--max-new-tokens", 3)
    assert said.out.count("╭─") == said.out.count(" token") == 2


def test_a_run_answers_with_its_base_in_few_bits(cli: Cli, finished: Path, data: str) -> None:
    """The run's own base is dense; how much worse eight bits are is a question that can be asked."""
    dense = cli("eval", finished, "--data", data, "--json").json
    eight = cli("eval", finished, "--data", data, "--quant", "int8", "--json").json
    assert eight["run"]["loss"] != dense["run"]["loss"]
    assert eight["run"]["loss"] == pytest.approx(dense["run"]["loss"], rel=0.05)


def test_progress_in_a_pipe(cli: Cli, finished: Path, data: str, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    said = cli("generate", finished, "--prompts", data, "--limit", 20, "--max-new-tokens", 1, "--out", out)
    assert said.code == 0
    counts = [int(line.split("/")[0]) for line in said.err.splitlines() if line.endswith("/20 answers")]
    assert counts == sorted(counts)
    assert counts[-1] == 20


def test_doctor(cli: Cli) -> None:
    found = cli("doctor", "--json").json
    assert found["versions"]["torch"]
    assert all(check["passed"] for check in found["checks"])
    assert len(found["checks"]) == 9
    assert found["gflops"] > 0


def test_version_and_help(cli: Cli) -> None:
    assert cli("--version").out.startswith("loratune 0.")
    said = cli("--help")
    assert said.code == 0
    for name in ("train", "data", "plan", "chat", "generate", "eval", "merge", "show", "report", "doctor"):
        assert name in said.out


def test_markup_in_data_is_printed_as_it_is(cli: Cli, base: str, tmp_path: Path) -> None:
    """Rich would take [bold] in somebody's text for its own."""
    rows = [{**row, "prompt": f"[bold]{row['prompt']}[/]"} for row in additions(6)]
    data = write_jsonl(tmp_path / "[red]rows.jsonl", rows)
    said = cli("data", data, "--model", base, "--show-mask", 1)
    assert "[bold]0 + 1 =[/]" in said.out
    assert "[red]rows.jsonl:1" in said.out
    (tmp_path / "[red]none.jsonl").write_text("")
    assert "[red]none.jsonl" in cli("data", tmp_path / "[red]none.jsonl", "--model", base).err


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)],
)
def test_colours_only_where_asked_for(
    environment: dict[str, str], coloured: bool, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No terminal, no colours; FORCE_COLOR asks for them and NO_COLOR has the last word."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said = cli("show", tmp_path / "nowhere")
    assert (said.code, said.out) == (1, "")
    assert ("\x1b[1;31m" in said.err) == coloured


def test_reproduce(cli: Cli, finished: Path, tmp_path: Path) -> None:
    found = cli("reproduce", finished, "--out", tmp_path / "again", "--json").json
    assert found["same_bits"]
    assert found["path"] == str(tmp_path / "again")
    said = cli("reproduce", finished)
    assert said.code == 0
    assert "✓ the same bits: adapter, losses and gradient norms" in said.out


def test_reproduce_something_else(cli: Cli, finished: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    said = cli("reproduce", copy)
    assert said.code == 4
    assert "the same bits were expected" in said.err


def test_answers_take_no_other_files_place(cli: Cli, finished: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("1 + 1 =\n")
    said = cli("generate", finished, "--prompts", prompts, "--out", prompts)
    assert said.code == 2
    assert "it is there already" in said.err
    assert prompts.read_text() == "1 + 1 =\n"
    said = cli("generate", finished, "--prompts", prompts, "--out", tmp_path / "nowhere" / "a.jsonl")
    assert said.code == 2
    assert "there is no folder" in said.err
