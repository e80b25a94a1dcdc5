"""LoRA, QLoRA and full fine-tuning on one task: `loratune compare` on the demo's function calls.

python benchmarks/methods.py            print the table, write benchmarks/results/methods.json (about 50 minutes)
python benchmarks/methods.py --quick    does it run?

The demo's questions, some 65 000 tokens of them, and 100 chats about functions that none of these has. Each method's
rate is searched on training rows; every run has a process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import weights
from comparison import RESULTS, say, write
from measuring import surroundings

import loratune as lt

ROOT = Path(__file__).resolve().parents[1]
PREPARE = ROOT / "examples" / "function_calling" / "prepare.py"
METHODS = ("lora", "full", "qlora", "base")
TOKENS, HELD_OUT, SEEDS = 66_000, 100, 2


def prepared(place: Path, tokens: int, held_out: int) -> Path:
    """The folder with `train.jsonl` and `heldout.jsonl`."""
    budgets = ("--train-tokens", str(tokens), "--heldout-rows", str(held_out))
    subprocess.run([sys.executable, str(PREPARE), "--out", str(place / "data"), *budgets], check=True)
    return place / "data"


def without_texts(found: dict[str, Any]) -> dict[str, Any]:
    """The comparison without the answers themselves, and without paths of this machine."""
    left_out = ("answers", "path")

    def figures(run: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in run.items() if key not in left_out}

    methods = {
        name: {**method, "runs": [figures(run) for run in method["runs"]]} for name, method in found["methods"].items()
    }
    kept = {key: value for key, value in found.items() if key not in ("model", "data", "created")}
    return {**kept, "base": figures(found["base"]), "methods": methods}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="OMP_NUM_THREADS (default 2)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the comparison's folder there; goes on with it")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"where the result goes (default {RESULTS.name})")
    parser.add_argument("--quick", action="store_true", help="does it run?")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        place = given.out or Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        base = place / "base"
        if not (base / "config.json").exists():
            weights.write_base(weights.REAL, base)
        data = prepared(place, 1500 if given.quick else TOKENS, 8 if given.quick else HELD_OUT)
        settings: dict[str, Any] = {"val": str(data / "heldout.jsonl"), "epochs": 1}
        settings |= {"lr": 1e-3, "max_steps": 2, "methods": ("lora", "full")} if given.quick else {"methods": METHODS}
        found = lt.compare(
            str(base),
            str(data / "train.jsonl"),
            seeds=1 if given.quick else SEEDS,
            answers=2 if given.quick else HELD_OUT,
            out=str(place / "comparison"),
            say=say,
            **settings,
        )
        result = {**without_texts(found.found), **surroundings("loratune", threads=given.threads)}
    print(found.found["verdict"]["text"])
    write(result, given, "methods")


if __name__ == "__main__":
    main()
