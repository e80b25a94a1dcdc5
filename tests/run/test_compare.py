"""A comparison: the same rows and steps for every method, a rate searched on other rows, a verdict that can be bad."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loratune.run.compare  # noqa: F401 - the module, which the function of its name hides in the package
from loratune.errors import ConfigError, DivergedError, LoratuneError
from loratune.report.comparison import heads_of, rows_of
from loratune.run import Comparison, compare
from loratune.run.apart import apart
from loratune.run.contender import Task
from tests.run.conftest import QUICK

MODULE = sys.modules["loratune.run.compare"]
SETTINGS = {name: value for name, value in QUICK.items() if name not in ("lr", "samples", "r")}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Runs in this process instead of one of their own; the tasks are kept."""
    tasks: list[Task] = []

    def in_this_process(function: Callable[[Any], Any], task: Task) -> Any:
        tasks.append(task)
        return json.loads(json.dumps(function(task)))

    monkeypatch.setattr(MODULE, "apart", in_this_process)
    return tasks


def run(base: str, data: str, out: Path, **changes: Any) -> Comparison:
    return compare(base, data, out=str(out), **{**SETTINGS, "answers": 2, **changes})


def test_all_of_it(base: str, data: str, tmp_path: Path, here: list[Task]) -> None:
    said: list[str] = []
    found = run(base, data, tmp_path / "c", methods=("lora", "full"), seeds=2, val=6, say=said.append)
    runs = [task for task in here if "search" not in task.folder and task.method != "base"]
    assert [(task.method, task.settings["seed"]) for task in runs] == [
        ("lora", 0),
        ("full", 0),
        ("lora", 1),
        ("full", 1),
    ]
    # Each seed draws an order of its own, the same one for every method.
    order = {(task.method, task.settings["seed"]): tokens_of_steps(Path(task.folder)) for task in runs}
    assert order["lora", 0] == order["full", 0] != order["lora", 1] == order["full", 1]
    assert len({task.train.sha256 for task in runs}) == len({task.held_out.sha256 for task in runs}) == 1
    assert {task.settings["max_steps"] for task in runs} == {6}
    # The rate: by rows that are in no held-out set, one for each method, more of them where the best is at the end.
    search = [task for task in here if "search" in task.folder]
    held = {str(example.place) for example in runs[0].held_out.examples}
    for task in search:
        assert not held & {str(example.place) for example in (*task.train.examples, *task.held_out.examples)}
    content = json.loads((tmp_path / "c" / "comparison.json").read_text())
    for method in ("lora", "full"):
        tried = content["methods"][method]["search"]["tried"]
        assert len(tried) >= 4
        best = min(tried, key=lambda one: math.inf if one["val_loss"] is None else one["val_loss"])
        assert {task.settings["lr"] for task in runs if task.method == method} == {best["lr"]}
        for one in content["methods"][method]["runs"]:
            assert one["answered"] == 2
            assert one["to_goal"]["val_loss"] <= content["goal"]
            assert one["curve"][-1]["step"] == 6
            tokens = [point["tokens"] for point in one["curve"]]
            assert tokens == sorted(tokens)
    full, lora = (content["methods"][name]["runs"][0] for name in ("full", "lora"))
    assert full["trainable"] > 2 * lora["trainable"]
    assert full["adapter_bytes"] > 2 * lora["adapter_bytes"]
    assert full["curve"][-1]["flops"] != lora["curve"][-1]["flops"] > 0
    assert content["base"]["val_loss"] == pytest.approx(lora["base_val_loss"], rel=1e-4)
    page = (tmp_path / "c" / "comparison.html").read_text()
    assert found.found["verdict"]["text"] in page
    assert said[-1] == found.found["verdict"]["text"]


def tokens_of_steps(folder: Path) -> list[tuple[int, int]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["tokens"], line["supervised_tokens"]) for line in lines if "tokens" in line]


def test_goes_on_with_what_is_there(base: str, data: str, tmp_path: Path, here: list[Task]) -> None:
    first = run(base, data, tmp_path / "c", methods=("lora", "rslora"), seeds=1, lr=1e-2)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").glob("*/adapter_model.safetensors")}
    again = run(base, data, tmp_path / "c", methods=("lora", "rslora"), seeds=1, lr=1e-2)
    assert len(times) == 2
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert again.found["verdict"] == first.found["verdict"]
    assert not any("search" in task.folder for task in here)


def test_the_base_is_measured_as_the_runs_are(base: str, data: str, tmp_path: Path, here: list[Task]) -> None:
    methods = ("lora", "rslora", "base")
    found = run(base, data, tmp_path / "c", methods=methods, seeds=1, lr=1e-2, loss="all").found
    (one,) = found["methods"]["lora"]["runs"]
    assert found["base"]["val_loss"] == pytest.approx(one["base_val_loss"], rel=1e-4)


def test_a_run_that_diverges_leaves_no_answer_and_the_others_figures(
    base: str, data: str, tmp_path: Path, here: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = MODULE.contend

    def contend(task: Task) -> dict[str, Any]:
        if task.method == "rslora" and task.settings["seed"] == 1:
            raise DivergedError("step 3: loss nan")
        return dict(whole(task))

    monkeypatch.setattr(MODULE, "contend", contend)
    compared = run(base, data, tmp_path / "c", methods=("lora", "rslora"), seeds=2, lr=1e-2, answers=0)
    assert not compared.regressed
    assert compared.failed == ("rslora, seed 1: step 3: loss nan",)
    content = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert content["verdict"]["text"].startswith("no answer: rslora, seed 1: step 3: loss nan")
    assert [one["val_loss"] is None for one in content["methods"]["rslora"]["runs"]] == [False, True]
    assert content["methods"]["lora"]["summary"]["val_loss"]["mean"] > 0
    page = (tmp_path / "c" / "comparison.html").read_text()
    assert "no answer: rslora, seed 1" in page
    assert 'class="headline bad"' in page


def short(folder: Path) -> dict[str, Any]:
    """As little as can be compared: decoding is slow on a CPU."""
    (folder / "other.txt").write_text("something else\n")
    return {"seeds": 1, "lr": 1e-2, "answers": 0, "elsewhere": folder / "other.txt", "max_steps": 2, "checks": "off"}


def test_the_base_is_said_to_be_unquantised_where_a_method_has_it_in_few_bits(
    base: str, data: str, tmp_path: Path, here: list[Task]
) -> None:
    pytest.importorskip("bitsandbytes")
    found = run(base, data, tmp_path / "c", methods=("lora", "qlora"), **short(tmp_path)).found
    assert heads_of(found) == ["base, unquantised", "lora", "qlora"]
    assert "base, unquantised" in (tmp_path / "c" / "comparison.html").read_text()
    before = dict(rows_of(found))["held-out loss before training"]
    lora, qlora = (found["methods"][name]["runs"][0]["base_val_loss"] for name in ("lora", "qlora"))
    assert before == ["–", f"{lora:.4f}", f"{qlora:.4f}"]
    assert lora == pytest.approx(found["base"]["val_loss"], rel=1e-4) != qlora


def test_the_base_of_a_comparison_in_few_bits_is_in_few_bits(
    base: str, data: str, tmp_path: Path, here: list[Task]
) -> None:
    pytest.importorskip("bitsandbytes")
    methods = ("lora", "rslora")
    found = run(base, data, tmp_path / "c", methods=methods, quant="nf4", **short(tmp_path)).found
    assert heads_of(found) == ["base, nf4", *methods]
    assert "held-out loss before training" not in dict(rows_of(found))
    (one,) = found["methods"]["lora"]["runs"]
    assert found["base"]["val_loss"] == pytest.approx(one["base_val_loss"], rel=1e-4)


@pytest.mark.parametrize(("least", "found"), [(0.0, 0), (0.4, 0.5), (-0.3, -0.5), (1.9, 2), (2.6, 2.5), (-9.0, -3.5)])
def test_the_search_ends_near_the_least(least: float, found: float) -> None:
    asked: list[float] = []

    def loss_at(power: float) -> float:
        asked.append(power)
        return (power - least) ** 2

    assert MODULE._best(loss_at) == found
    assert len(set(asked)) <= 7


def test_a_rate_that_diverges_is_no_failure(
    base: str, data: str, tmp_path: Path, here: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    def contend(task: Task) -> dict[str, Any]:
        lr = task.settings.get("lr", 1e-2)
        if lr > 1e-2:
            raise DivergedError("nan")
        loss = 1 / lr
        took = {"tokens": 1, "flops": 1, "seconds": 1}
        points = [{"step": step, "val_loss": at, **took} for step, at in ((0, 999), (1, loss))]
        sizes = {"adapter_bytes": 1, "trainable": 1, "peak_memory_bytes": 1}
        return {"val_loss": loss, "seconds": 1.0, "curve": points, **sizes}

    monkeypatch.setattr(MODULE, "contend", contend)
    monkeypatch.setattr(MODULE, "learning_rate", lambda *_: (5e-3, ""))
    found = run(base, data, tmp_path / "c", methods=("lora", "dora"), seeds=1, answers=0)
    tried = found.found["methods"]["lora"]["search"]["tried"]
    assert [one["val_loss"] is None for one in tried] == [False, False, False, True]
    assert found.found["methods"]["lora"]["search"]["lr"] == 5e-3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ("lora",)}, "nothing to compare"),
        ({"methods": ("lora", "ful")}, "did you mean 'full'"),
        ({"methods": ("base", "lora")}, "nothing to compare"),
        ({"seeds": 0}, "at least one"),
        ({"tolerance": 2.0}, "a share"),
        ({"method": "lora"}, "decides it"),
        ({"early_stop": 2}, "early_stop=2: .*unequal numbers of steps"),
        ({"methods": ("lora", "full"), "r": 8}, "full: r=8"),
        ({"methods": ("lora", "full"), "quant": "nf4"}, "full: quant"),
        ({"val": 0}, "held-out rows"),
    ],
    ids=str,
)
def test_refused_before_anything_starts(
    base: str, data: str, tmp_path: Path, here: list[Task], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        run(base, data, tmp_path / "c", **changes)
    assert not here
    assert not (tmp_path / "c").exists()


def test_rows_that_are_no_text_are_refused_as_other_text(
    base: str, data: str, tmp_path: Path, here: list[Task]
) -> None:
    with pytest.raises(ConfigError, match=r"elsewhere: .*sums\.jsonl holds rows of another shape"):
        run(base, data, tmp_path / "c", elsewhere=data)
    assert not here


# -- a process of its own ----------------------------------------------------------------------------------------------


def double(number: int) -> int:
    print("noise")
    return 2 * number


def refuse(_: Any) -> None:
    raise ConfigError(["one", "two"], hint="three")


def die(_: Any) -> None:
    os.kill(os.getpid(), 9)


def test_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    assert apart(double, 21) == 42
    with pytest.raises(ConfigError) as refused:
        apart(refuse, None)
    assert (refused.value.problems, refused.value.hint) == (("one", "two"), "three")
    with pytest.raises(LoratuneError, match="signal 9"):
        apart(die, None)


@pytest.mark.full
@pytest.mark.parametrize(
    ("methods", "tolerance", "regressed", "code"),
    [("lora,qlora", "0.5", False, 0), ("lora,full", "0", True, 7)],
    ids=["not worse", "worse"],
)
def test_the_command(
    base: str, data: str, tmp_path: Path, methods: str, tolerance: str, regressed: bool, code: int
) -> None:
    """Processes of their own, from the command line, with an exit code that tells."""
    words = ["--methods", methods, "--seeds", "1", "--lr", "1e-2", "--max-steps", "4", "--dtype", "fp32"]
    command = [sys.executable, "-m", "loratune", "compare", base, data, "--out", str(tmp_path / "c"), "--json", *words]
    done = subprocess.run([*command, "--tolerance", tolerance], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert json.loads(done.stdout)["verdict"]["regressed"] is regressed
    assert (tmp_path / "c" / "comparison.html").is_file()
