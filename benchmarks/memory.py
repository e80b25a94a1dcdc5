"""The most memory of a step, ours beside the strongest peft loop, and how it grows.

python benchmarks/memory.py            print the table, write benchmarks/results/memory.json
python benchmarks/memory.py --quick    does it run?

Each case is a fresh process that does a step, then the same step once more with every allocation counted: `live` is the
most bytes that this step holds beyond what stood before it (weights, adapters, optimizer states); `over base` is what
the process takes beyond the loaded base, fragments and caches included.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import weights
from alternate import Machine
from comparison import common, machine_of, say, write
from job import Job, Report, Workload
from measuring import spread, surroundings
from side import SIDES
from workloads import dense, of_length

SIDES_COMPARED = ("ours", "peft-best")
ROWS, LENGTH = 4, 256


@dataclass(frozen=True)
class Case:
    """One step; sizes are in multiples of the first case's."""

    rows: int = 1
    adapters: int = 1
    layers: int = 1


GROWTH = {
    "4 × 256 tokens, 6 layers": Case(),
    "tokens of a step ×2": Case(rows=2),
    "tokens of a step ×4": Case(rows=4),
    "8 adapters attached, 1 active": Case(adapters=8),
    "layers ×2": Case(layers=2),
}


def case_job(machine: Machine, given: argparse.Namespace, number: int, case: Case) -> Job:
    """A narrow model of random weights with the case's layers, and one step of its tokens."""
    place = machine.place / f"case{number}"
    layers, vocabulary = (weights.SHAPES["narrow"][name] for name in ("num_hidden_layers", "vocab_size"))
    base = weights.write_base("narrow", place / "base", num_hidden_layers=layers * case.layers)
    workload = of_length(ROWS * case.rows, LENGTH, vocabulary)
    return job_of(place, base, workload, given, adapters=case.adapters)


def job_of(place: Path, base: Path, workload: Workload, given: argparse.Namespace, *, adapters: int = 1) -> Job:
    place.mkdir(parents=True, exist_ok=True)
    path = workload.write(place / "workload.json")
    job = Job("ours", str(base), str(place / "adapter"), str(path), given.device, adapters=adapters, trace=True)
    weights.write_adapter(base, Path(job.adapter), r=job.r, alpha=job.alpha)
    return replace(job, order="given")


def measured(machine: Machine, job: Job, count: int) -> dict[str, Any]:
    """Side → spread of its peaks in so many rounds; of ours also what the run planned."""
    reports: dict[str, list[Report]] = {side: [] for side in SIDES_COMPARED}
    for number in range(count):
        for side in reversed(SIDES_COMPARED) if number % 2 else SIDES_COMPARED:
            reports[side].append(machine.report(replace(job, side=side)))
    return {side: peaks(found) for side, found in reports.items()}


def peaks(reports: Sequence[Report]) -> dict[str, Any]:
    kind = "allocated" if "peak_allocated" in reports[0].memory else "rss"
    over = [report.memory[f"peak_{kind}"] - report.memory[f"base_{kind}"] for report in reports]
    found: dict[str, Any] = {
        "live": spread([report.memory["live"] for report in reports]),
        "over_base": spread(over),
        "peak": spread([report.memory[f"peak_{kind}"] for report in reports]),
    }
    notes = reports[0].notes
    if "planned" in notes:
        step = found["live"]["median"] + notes["standing"]
        found |= {
            "planned": notes["planned"],
            "standing": notes["standing"],
            "planned_by_measured": notes["planned"] / step,
        }
    return found


def growth(cases: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Case → side → how many times the first case's live bytes."""
    first, *others = cases
    return {
        name: {
            side: found["live"]["median"] / cases[first][side]["live"]["median"] for side, found in cases[name].items()
        }
        for name in others
    }


def table(result: dict[str, Any]) -> str:
    def cells(found: dict[str, Any]) -> str:
        return "".join(
            f"{found[side][what]['median'] / 2**20:>10.0f}" for what in ("live", "over_base") for side in found
        )

    labels = "".join(f"{SIDES[side].label[:9]:>10}" for _ in range(2) for side in SIDES_COMPARED)
    lines = [f"{'MiB':34}{'live':>20}{'over base':>20}", f"{'':34}{labels}"]
    lines.append(f"{result['model']['shape'] + ', 4 × 256 tokens':34}{cells(result['step'])}")
    for name, found in result["growth"].items():
        factors = result["factors"].get(name)
        grown = "   live " + ", ".join(f"×{factor:.2f}" for factor in factors.values()) if factors else ""
        lines.append(f"{name:34}{cells(found)}{grown}")
    ours = result["step"]["ours"]
    share = f"{ours['planned_by_measured']:.2f} of what was measured"
    return "\n".join([*lines, "", f"planned {ours['planned'] / 2**20:.0f} MiB beyond the base: {share}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny weights, one round: does it run? Nothing to publish")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    common(parser)
    given = parser.parse_args()
    count = 1 if given.quick else given.rounds
    with machine_of(given) as machine:
        machine.refuse_missing(SIDES_COMPARED)
        shape = "tiny" if given.quick else weights.REAL
        base = weights.write_base(shape, machine.place / "base")
        model = weights.facts(base, shape)
        one = job_of(machine.place / "step", base, dense(weights.tokenizer(), 1), given)
        step = measured(machine, one, count)
        cases = {}
        for number, (name, case) in enumerate(GROWTH.items()):
            say(name)
            cases[name] = measured(machine, case_job(machine, given, number, case), count)
    result = {
        **surroundings("loratune", "peft", "torch", "transformers", device=given.device, threads=given.threads),
        "model": model,
        "rounds": count,
        "step": step,
        "growth": cases,
        "factors": growth(cases),
    }
    write(result, given, "memory_cuda" if given.device.startswith("cuda") else "memory")
    print(table(result))


if __name__ == "__main__":
    main()
