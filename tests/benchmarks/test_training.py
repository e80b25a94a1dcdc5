"""What the training benchmarks compare: the same ids for all sides, sums that are right, parity that can fail.

No test looks at a time.
"""

from __future__ import annotations

import importlib
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.test_measuring import BENCHMARKS, run
from tests.models import rows_of, saved


class Bench:
    """The modules of the benchmarks, which import each other by their plain names."""

    def __getattr__(self, name: str) -> Any:
        return importlib.import_module(name)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return Bench()


@pytest.fixture
def job(bench: Any, tmp_path: Path) -> Any:
    """A tiny base with an adapter, and three rows: two of them begin alike."""
    base = saved(tmp_path / "base")
    bench.weights.write_adapter(base, tmp_path / "adapter", r=4, alpha=8)
    return bench.job.Job("ours", str(base), str(tmp_path / "adapter"), "", dtype="fp32", r=4, alpha=8)


def workload_of(bench: Any, *lengths: int) -> Any:
    rows = [bench.job.Row(list(row.ids), list(row.supervised)) for row in rows_of(*lengths)]
    shared = bench.job.Row([*rows[0].ids[:-2], 7, 8, 9], [False] * (len(rows[0].ids) - 2) + [True] * 3)
    return bench.job.Workload("test", 4, 2, rows[:2], [*rows, shared])


# -- what is trained on ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("weights").tokenizer()


@pytest.mark.model
def test_dense_rows_are_supervised_all_over(bench: Any, tokenizer: Any) -> None:
    work = bench.workloads.dense(tokenizer, 3)
    assert [len(row.ids) for row in (*work.warm, *work.rows)] == [256] * 20
    assert all(row.supervised == [False] + [True] * 255 for row in work.rows)
    assert len({tuple(row.ids) for row in (*work.warm, *work.rows)}) == 20
    assert (work.tokens, work.supervised) == (12 * 256, 12 * 255)


@pytest.mark.model
@pytest.mark.parametrize(("name", "batch_size", "micro"), [("chats", 8, 8), ("live_multiple", 8, 2)])
def test_of_chats_the_answers_are_supervised(
    bench: Any, tokenizer: Any, name: str, batch_size: int, micro: int
) -> None:
    work = getattr(bench.workloads, name)(tokenizer, 2)
    assert (work.batch_size, work.micro_batch, len(work.rows)) == (batch_size, micro, 2 * batch_size)
    for row in work.rows:
        answer = tokenizer.decode([token for token, target in zip(row.ids, row.supervised, strict=True) if target])
        assert set(json.loads(answer.removesuffix("<|im_end|>").strip())) == {"name", "arguments"}
        before = tokenizer.decode(row.ids[: row.supervised.index(True)])
        assert before.endswith("<|im_start|>assistant\n")


@pytest.mark.model
def test_live_rows_come_in_whole_groups_and_mixed(bench: Any, tokenizer: Any) -> None:
    live = bench.workloads.live_multiple
    assert len(live(tokenizer, 0).rows) == len(bench.workloads.live_chats())
    few, many = live(tokenizer, 2).rows, live(tokenizer, 4).rows
    assert {tuple(row.ids) for row in few} < {tuple(row.ids) for row in many}


@pytest.mark.model
def test_one_system_prompt_stands_before_every_chat(bench: Any, tokenizer: Any) -> None:
    work = bench.workloads.shared_prefix(tokenizer, 2)
    assert len({tuple(row.ids[:950]) for row in work.rows}) == 1
    assert len(work.rows) == 32
    assert all(1000 < len(row.ids) < 1200 for row in work.rows)
    assert len(bench.workloads.shared_prefix(tokenizer, 0, rows=40).rows) == 40


def test_a_workload_is_read_as_it_was_written(bench: Any, tmp_path: Path) -> None:
    work = workload_of(bench, 9, 7)
    assert bench.job.Workload.read(work.write(tmp_path / "workload.json")) == work


def test_every_side_sees_the_same_ids_and_targets(bench: Any) -> None:
    work = workload_of(bench, 9, 7, 12)
    ours = bench.side_ours.rendered(work.rows)
    batch = bench.side_peft.padded(work.rows, "cpu")
    for number, row in enumerate(work.rows):
        length = len(row.ids)
        assert list(ours[number].ids) == row.ids == batch["input_ids"][number, :length].tolist()
        assert row.labels == batch["labels"][number, :length].tolist()
        assert [label != -100 for label in row.labels] == list(ours[number].supervised)
        assert batch["labels"][number, length:].tolist() == [-100] * (batch["labels"].shape[1] - length)
        assert batch["attention_mask"][number].sum() == length


def test_by_length_every_row_comes_once_beside_its_like(bench: Any) -> None:
    rows = workload_of(bench, 9, 3, 8, 4, 20).rows
    batches = bench.job.by_length(rows, 2, seed=0)
    assert sorted(id(row) for batch in batches for row in batch) == sorted(id(row) for row in rows)
    lengths = sorted((sorted(len(row.ids) for row in batch) for batch in batches), reverse=True)
    assert lengths == sorted(lengths, reverse=True)
    assert all(low[-1] <= high[0] for high, low in pairwise(lengths))


# -- sums --------------------------------------------------------------------------------------------------------------


def report(bench: Any, seconds: list[float]) -> Any:
    memory = {"base_rss": 100, "peak_rss": 150}
    return bench.job.Report(seconds, [1.0] * len(seconds), memory, {"torch": "2"}, {})


def test_rates_and_ratios_are_taken_within_a_round(bench: Any) -> None:
    work = workload_of(bench, 10, 10)
    totals = {"ours": [2.0, 20.0, 3.0], "peft-best": [4.0, 80.0, 3.0]}
    found = [
        bench.alternate.Round({side: report(bench, [t[i] / 2, t[i] / 2]) for side, t in totals.items()}, 400.0)
        for i in range(3)
    ]
    found[0].reports["trl"] = report(bench, [5.0, 5.0])
    result = bench.alternate.summary(found, work, multiplied=10)
    assert result["ratios"]["peft-best"]["samples"] == [2.0, 4.0, 1.0]
    assert result["ratios"]["trl"]["samples"] == [5.0]
    ours = result["sides"]["ours"]
    assert ours["tokens_per_second"]["median"] == pytest.approx(work.tokens / 3.0, rel=1e-3)
    assert ours["supervised_per_second"]["median"] == pytest.approx(work.supervised / 3.0, rel=1e-3)
    assert ours["examples_per_second"]["median"] == pytest.approx(3 / 3.0)
    assert ours["step_seconds"]["median"] == statistics.median([1, 1, 10, 10, 1.5, 1.5])
    assert ours["memory"]["over_base"]["median"] == 50
    assert result["floor"]["tokens_per_second"]["median"] == 10.0
    assert ours["floor_share"]["median"] == pytest.approx(work.tokens / 3.0 / 10.0, rel=1e-3)


def test_rounds_turn_the_order_round_and_slow_sides_run_once(bench: Any, job: Any) -> None:
    seen: list[str] = []

    class Noting(bench.alternate.Machine):  # type: ignore[misc, name-defined]
        def report(self, job: Any) -> Any:
            seen.append(job.side)
            return report(bench, [1.0])

        def flops(self, job: Any) -> float:
            return 1.0

    machine = Noting(Path(), "python")
    bench.alternate.rounds(machine, job, ("ours", "peft-best", "trl"), ("trl",), 3, lambda _: None)
    assert seen == ["ours", "peft-best", "trl", "peft-best", "ours", "ours", "peft-best"]


def test_the_clock_leaves_the_warm_up_out(bench: Any, job: Any) -> None:
    clock = bench.clock.Clock(job, warm_steps=2)
    clock.loaded()
    clock.begin()
    for loss in (4.0, 3.0, 2.0, 1.0):
        clock.step(loss)
    found = clock.report()
    assert (len(found.seconds), found.losses) == (2, [2.0, 1.0])
    assert found.memory["peak_rss"] >= found.memory["base_rss"] > 0


def test_live_bytes_are_the_most_that_is_held_at_once(bench: Any) -> None:
    def step() -> None:
        first = torch.ones(1_000_000)
        second = first * 2
        del first
        (second + 1).sum()

    assert bench.clock.live_bytes(step, cuda=False) == pytest.approx(8_000_000, abs=10_000)


def test_growth_is_relative_to_the_first_case(bench: Any) -> None:
    def case(ours: float, theirs: float) -> dict[str, Any]:
        return {"ours": {"live": {"median": ours}}, "peft-best": {"live": {"median": theirs}}}

    found = bench.memory.growth({"one": case(10, 20), "two": case(15, 40)})
    assert found == {"two": {"ours": 1.5, "peft-best": 2.0}}


# -- parity ------------------------------------------------------------------------------------------------------------


def test_gradients_agree_in_fp32_and_all_rows_are_gone_through(bench: Any, job: Any) -> None:
    work = workload_of(bench, 40, 9, 17)
    found = bench.parity.deviations(job, replace(work, warm=[], rows=bench.parity.parity_rows(work.rows)))
    bench.parity.check(found)
    clock = bench.clock.Clock(job, warm_steps=1)
    bench.side_ours.train(job, work, clock)
    ours = clock.report()
    clock = bench.clock.Clock(job, warm_steps=1)
    bench.side_peft.train(replace(job, side="peft-best"), work, clock)
    assert ours.losses == pytest.approx(clock.report().losses, rel=1e-4)


@pytest.mark.parametrize("plant", ["ours", "peft-best"])
def test_parity_finds_a_wrong_gradient(bench: Any, job: Any, monkeypatch: pytest.MonkeyPatch, plant: str) -> None:
    work = workload_of(bench, 12, 9)
    right: Callable[..., dict[str, torch.Tensor]] = bench.parity.SIDES[plant]

    def wrong(*given: Any) -> dict[str, torch.Tensor]:
        found = right(*given)
        name = min(found)
        return found | {name: found[name] * 1.001}

    monkeypatch.setitem(bench.parity.SIDES, plant, wrong)
    with pytest.raises(bench.parity.NoParityError, match=rf"{plant}.*no speed counts"):
        bench.parity.check(bench.parity.deviations(job, work))


def test_parity_finds_a_wrong_adapter_in_the_product(bench: Any, job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attach = bench.side_ours.lt.attach

    def scaled(*given: Any, **named: Any) -> Any:
        lora = attach(*given, **named)
        first = next(iter(lora.factors().values()))
        first.scale *= 1.01
        return lora

    monkeypatch.setattr(bench.side_ours.lt, "attach", scaled)
    with pytest.raises(bench.parity.NoParityError):
        bench.parity.check(bench.parity.deviations(job, workload_of(bench, 12, 9)))


def test_gradients_that_are_missing_or_nothing_are_no_parity(bench: Any) -> None:
    one = {"layer.A": torch.ones(3)}
    with pytest.raises(bench.parity.NoParityError, match=r"layer\.B"):
        bench.parity.deviation(one, {"layer.B": torch.ones(3)})
    with pytest.raises(bench.parity.NoParityError, match="no gradient"):
        bench.parity.deviation(one, {"layer.A": torch.zeros(3)})
    with pytest.raises(bench.parity.NoParityError):
        bench.parity.check({"ours": {"fp32": {"whole": float("nan"), "worst": float("nan")}}})


def test_parity_compares_the_rows_that_begin_alike(bench: Any) -> None:
    work = workload_of(bench, 40, 9, 17)
    chosen = bench.parity.parity_rows(work.rows)
    assert [len(row.ids) for row in chosen[2:]] == [9]
    assert sorted(len(row.ids) for row in chosen[:2]) == [40, 41]


def test_parity_cuts_long_rows_that_are_scored_before_the_cut(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.parity, "LONGEST", 8)
    scored, late = [False] + [True] * 19, [False] * 19 + [True]
    rows = [
        bench.job.Row(list(range(begin, begin + 20)), mask) for begin, mask in ((3, scored), (40, late), (80, scored))
    ]
    chosen = bench.parity.parity_rows(rows)
    assert sorted(len(row.ids) for row in chosen) == [8, 8, 20]
    assert all(row.targets for row in chosen)


def test_what_is_missing_is_said_before_anything_runs(bench: Any, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(SystemExit, match=r"pip install .*trl.*--peer-python.*--sides ours,peft"):
        bench.alternate.Machine(tmp_path, str(python)).refuse_missing(["ours", "trl", "peft"])


# -- the commands ------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("name", ["train_dense", "train_chats", "train_shared_prefix"])
def test_a_quick_run(tmp_path: Path, name: str) -> None:
    file = tmp_path / "result.json"
    words = ("--quick", "--model-shape", "tiny", "--sides", "peft,peft-best", "--json", str(file))
    done = run(str(BENCHMARKS / f"{name}.py"), *words)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text(encoding="utf-8"))
    assert set(result["ratios"]) == {"peft", "peft-best"}
    assert result["parity"]["gradients"]["ours"]["fp32"]["worst"] <= 1e-4
    assert "strongest peft loop" in done.stdout


@pytest.mark.full
def test_a_quick_run_of_memory(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = run(str(BENCHMARKS / "memory.py"), "--quick", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert set(json.loads(file.read_text(encoding="utf-8"))["factors"]["layers ×2"]) == {"ours", "peft-best"}
