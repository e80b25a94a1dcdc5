"""How long until something happens: the command's help, its doctor, imports, and the first training step.

python benchmarks/startup.py            print the table, write benchmarks/results/startup.json

The first step is of a two-layer model with random weights on eight chats: nearly all of it is what comes before,
imports, reading, rendering, planning. `checked` has the fast checks; of the full ones, overfitting a batch is 30 steps
of its own, and not for weights like these. Everything in fresh processes, in turn; files are in the system's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import weights
from alternate import HERE, Machine
from comparison import common, machine_of, say, write
from measuring import shown_seconds, spread, surroundings
from workloads import demo_chats

Timed = Callable[[], float]


def whole(machine: Machine, *command: str) -> Timed:
    """Seconds from the start of a process to its end."""

    def run() -> float:
        begun = time.time()
        _called(machine, command)
        return time.time() - begun

    return run


def until_step(machine: Machine, python: str, who: str, base: Path, data: Path) -> Timed:
    """Seconds from the start of a process to the end of its first training step."""

    def run() -> float:
        out = machine.place / "out"
        shutil.rmtree(out, ignore_errors=True)
        begun = time.time()
        said = _called(machine, (python, str(HERE / "first_step.py"), who, str(base), str(data), str(out)))
        line = next(line for line in said.splitlines() if line.startswith("first step at "))
        return float(line.removeprefix("first step at ")) - begun

    return run


def _called(machine: Machine, command: tuple[str, ...]) -> str:
    caches = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(machine.place / "datasets")}
    environment = os.environ | caches | {"OMP_NUM_THREADS": str(machine.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed\n{done.stderr[-3000:]}")
    return done.stdout


def timed(machine: Machine, base: Path, data: Path) -> dict[str, Timed]:
    python, peers = sys.executable, machine.peer_python
    return {
        "loratune --help": whole(machine, python, "-m", "loratune", "--help"),
        "loratune doctor": whole(machine, python, "-m", "loratune", "doctor"),
        "import loratune": whole(machine, python, "-c", "import loratune"),
        "import torch": whole(machine, python, "-c", "import torch"),
        "import peft": whole(machine, peers, "-c", "import peft"),
        "from trl import SFTTrainer": whole(machine, peers, "-c", "from trl import SFTTrainer"),
        "first step, loratune, checked": until_step(machine, python, "ours", base, data),
        "first step, loratune, unchecked": until_step(machine, python, "ours-unchecked", base, data),
        "first step, TRL": until_step(machine, peers, "trl", base, data),
    }


def written(place: Path) -> tuple[Path, Path]:
    """A tiny base with its weights, and eight chats."""
    base = weights.write_base("tiny", place / "base")
    weights.load_model(str(base), "bf16", "cpu").save_pretrained(base)
    data = place / "chats.jsonl"
    rows = [json.dumps({"messages": messages}) for messages in demo_chats()[:8]]
    data.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return base, data


def table(result: dict[str, Any]) -> str:
    lines = []
    for name, found in result["seconds"].items():
        low, high = found["range"]
        lines.append(f"{name:36}{shown_seconds(found['median']):>10}   ({low:.3g} to {high:.3g})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round: does it run? Nothing to publish")
    common(parser)
    given = parser.parse_args()
    count = 1 if given.quick else given.rounds
    with machine_of(given) as machine:
        machine.refuse_missing(("trl",))
        runs = timed(machine, *written(machine.place))
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(-1, count):  # the round before the first fills the system's file cache
            for name in list(runs) if number % 2 else reversed(list(runs)):
                took = runs[name]()
                if number >= 0:
                    seconds[name].append(took)
            say(f"round {number + 1} of {count}")
    result = {
        **surroundings("loratune", "peft", "torch", "transformers", threads=given.threads),
        "rounds": count,
        "seconds": {name: spread(found) for name, found in seconds.items()},
    }
    write(result, given, "startup")
    print(table(result))


if __name__ == "__main__":
    main()
