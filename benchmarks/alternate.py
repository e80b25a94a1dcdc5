"""Sides one after the other in fresh processes, in turned order each round, and what their reports come to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from job import Job, Report, Workload
from measuring import ratios, spread
from side import SIDES

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Machine:
    """Where processes run.

    Attributes:
        place: a folder for their files. peer_python: the interpreter of the peers; the present one's is ours.
    """

    place: Path
    peer_python: str
    threads: int = 2

    def call(self, python: str, *words: str) -> None:
        """Run a script of this folder to its end.

        Raises:
            SystemExit: it failed; with the end of what it said.
        """
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}
        script, *rest = words
        command = [python, str(HERE / script), *rest]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            how = f"was ended by signal {-done.returncode}" if done.returncode < 0 else "failed"
            raise SystemExit(f"{script} {' '.join(rest[:1])} {how}\n{done.stderr[-3000:]}")

    def report(self, job: Job) -> Report:
        """One side's work in a fresh process."""
        told, result = self.place / "job.json", self.place / "report.json"
        python = sys.executable if job.side == "ours" else self.peer_python
        self.call(python, "side.py", str(job.write(told)), str(result))
        return Report.read(result)

    def parity(self, job: Job) -> dict[str, Any]:
        told, result = self.place / "job.json", self.place / "parity.json"
        self.call(sys.executable, "parity.py", str(job.write(told)), str(result))
        return dict(json.loads(result.read_text(encoding="utf-8")))

    def flops(self, job: Job) -> float:
        """Operations a second that this machine's matrix products reach now."""
        result = self.place / "floor.json"
        self.call(sys.executable, "floor.py", job.base, job.device, job.dtype, str(result))
        return float(json.loads(result.read_text(encoding="utf-8"))["flops"])

    def refuse_missing(self, sides: Sequence[str]) -> None:
        """Say before anything runs what is not installed, and how to go without it."""
        for package in dict.fromkeys(SIDES[side].needs for side in sides if side != "ours"):
            looked = subprocess.run([self.peer_python, "-c", f"import {package}"], capture_output=True, check=False)
            if looked.returncode:
                without = ",".join(side for side in sides if SIDES[side].needs != package)
                raise SystemExit(
                    f"{package} cannot be imported by {self.peer_python}: install it there "
                    f"(pip install -c constraints.txt {package}), name another interpreter with --peer-python, "
                    f"or leave its sides out with --sides {without}"
                )


@dataclass(frozen=True)
class Round:
    """Reports by side, and the machine's matrix products in this round."""

    reports: dict[str, Report]
    flops: float


def rounds(machine: Machine, job: Job, sides: Sequence[str], once: Sequence[str], count: int, say: Any) -> list[Round]:
    """Every side in every round, those of `once` in the first alone."""
    found = []
    for number in range(count):
        turn = [side for side in sides if number == 0 or side not in once]
        reports = {}
        for side in reversed(turn) if number % 2 else turn:
            reports[side] = machine.report(replace(job, side=side))
            total = sum(reports[side].seconds)
            say(f"round {number + 1} of {count}: {SIDES[side].label:22} {total:7.1f} s")
        found.append(Round(reports, machine.flops(job)))
    return found


def summary(found: Sequence[Round], workload: Workload, multiplied: int) -> dict[str, Any]:
    """Rates, memory and losses of each side, and how many times as fast as each peer ours is within a round.

    Tokens are those of the rows: no pads, and a shared one counts for each of its rows.
    """
    sides = list(found[0].reports)
    result: dict[str, Any] = {"sides": {}, "ratios": {}}
    result["floor"] = {
        "flops": spread([one.flops for one in found]),
        "tokens_per_second": spread([one.flops / (4 * multiplied) for one in found]),
    }
    for side in sides:
        having = [one for one in found if side in one.reports]
        reports = [one.reports[side] for one in having]
        totals = [sum(report.seconds) for report in reports]
        floors = [one.flops / (4 * multiplied) for one in having]
        result["sides"][side] = {
            "label": SIDES[side].label,
            "tokens_per_second": spread([workload.tokens / total for total in totals]),
            "supervised_per_second": spread([workload.supervised / total for total in totals]),
            "examples_per_second": spread([len(workload.rows) / total for total in totals]),
            "floor_share": spread([workload.tokens / t / floor for t, floor in zip(totals, floors, strict=True)]),
            "step_seconds": spread([second for report in reports for second in report.seconds]),
            "total_seconds": spread(totals),
            "memory": memory_of(reports),
            "losses": reports[0].losses,
            "versions": reports[0].versions,
            **reports[0].notes,
        }
    for peer in sides:
        both = [one.reports for one in found if {peer, "ours"} <= one.reports.keys()]
        if peer != "ours" and both:
            theirs, ours = ([sum(reports[side].seconds) for reports in both] for side in (peer, "ours"))
            result["ratios"][peer] = ratios(theirs, ours)
    return result


def memory_of(reports: Sequence[Report]) -> dict[str, Any]:
    """Each figure's spread, and the peak over the loaded base: `over_base`, resident or allocated."""
    names = reports[0].memory
    found: dict[str, Any] = {name: spread([report.memory[name] for report in reports]) for name in names}
    kind = ("peak_allocated", "base_allocated") if "peak_allocated" in names else ("peak_rss", "base_rss")
    found["over_base"] = spread([report.memory[kind[0]] - report.memory[kind[1]] for report in reports])
    return found
