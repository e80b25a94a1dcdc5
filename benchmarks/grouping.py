"""What drawing rows that begin alike into one step does to the held-out loss, against fully random order.

python benchmarks/grouping.py                     print the table, write benchmarks/results/grouping.json
python benchmarks/grouping.py --quick             a few rows, one seed: only to see that it works; writes nothing

SmolLM2-135M on `live_multiple`, each question with the whole schemas of its functions, as `loratune train` does it. For
each seed both orders start from the same adapter and go through the same rows as often; no held-out row offers a
function that a training row offers.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "2"  # torch reads it once
os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measuring import spread, surroundings
from weights import find_gguf
from workloads import Messages, live_chats, rendered

import loratune as lt
from loratune.model import Base, load_base

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "grouping.json"
BATCH_SIZE = 8
ORDERS = {"random": False, "grouped": True}


@dataclass(frozen=True)
class Size:
    """How much is trained on and evaluated; rows of more than `max_tokens` are left out."""

    train: int
    heldout: int
    max_tokens: int
    seeds: int


FULL, QUICK = Size(96, 40, 800, 3), Size(16, 4, 350, 1)


@dataclass(frozen=True)
class Sides:
    train: list[Messages]
    heldout: list[Messages]


def drawn(size: Size, tokenizer: Any) -> Sides:
    """One held-out row of each of some groups; then whole groups without any of their functions, rows mixed."""
    chats = live_chats()
    groups: dict[str, list[Messages]] = {}
    for chat, row in zip(chats, rendered(chats, tokenizer), strict=True):
        if len(row.ids) <= size.max_tokens:
            groups.setdefault(chat[0]["content"], []).append(chat)
    names = list(groups)
    dice = random.Random(0)
    dice.shuffle(names)
    apart = names[: size.heldout]
    taken = {function for name in apart for function in functions_of(name)}
    rest = [name for name in names[size.heldout :] if not taken & functions_of(name)]
    train = [chat for name in rest for chat in groups[name]][: size.train]
    assert len(train) == size.train, f"only {len(train)} rows are left to train on"
    dice.shuffle(train)
    return Sides(train, [groups[name][0] for name in apart])


def functions_of(system: str) -> set[str]:
    """The functions that a system prompt offers, one schema a line after the first."""
    return {json.loads(line)["name"] for line in system.splitlines()[1:]}


def trained(base: Base, sides: Sides, epochs: int, seed: int, *, grouped: bool) -> dict[str, Any]:
    """One run: its held-out loss and that of its base, and the tokens that went through the model."""
    with tempfile.TemporaryDirectory() as place:
        heldout = Path(place) / "heldout.jsonl"
        heldout.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in sides.heldout), encoding="utf-8")
        run = lt.train(
            base.model,
            [{"messages": chat} for chat in sides.train],
            tokenizer=base.tokenizer,
            out=str(Path(place) / "run"),
            val=str(heldout),
            seed=seed,
            epochs=epochs,
            batch_size=BATCH_SIZE,
            share_prefixes=True,
            group_prefixes=grouped,
            lora_dropout=0.0,
            eval_every=10**6,
            samples=0,
            checks="off",
        )
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps = [line for line in lines if "loss" in line]
    assert sum(step["examples"] for step in steps) == epochs * len(sides.train)
    return {
        "seed": seed,
        "val_loss": run.record["result"]["val_loss"],
        "base_val_loss": run.record["result"]["base_val_loss"],
        "tokens": sum(step["tokens"] for step in steps),
        "computed_tokens": sum(step["computed_tokens"] for step in steps),
        "step_seconds": round(sum(step["step_seconds"] for step in steps), 1),
    }


def result_of(size: Size, epochs: int) -> dict[str, Any]:
    around = surroundings("loratune", "torch", "transformers")
    base = load_base(find_gguf())
    sides = drawn(size, base.tokenizer)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ORDERS}
    for seed in range(size.seeds):
        # In turn, so that neither order always has the warmer machine.
        for name in sorted(ORDERS, reverse=bool(seed % 2)):
            found = trained(base, sides, epochs, seed, grouped=ORDERS[name])
            runs[name].append(found)
            print(f"seed {seed}  {name:8} {found['val_loss']:.4f}  {found['step_seconds']:.0f} s", file=sys.stderr)
    return {
        **around,
        "model": "SmolLM2-135M-Instruct",
        "data": {"train": len(sides.train), "heldout": len(sides.heldout), "max_tokens": size.max_tokens},
        "epochs": epochs,
        "batch_size": BATCH_SIZE,
        "base_val_loss": runs["random"][0]["base_val_loss"],
        "runs": runs,
        "val_loss": {name: spread([run["val_loss"] for run in runs[name]]) for name in ORDERS},
        "val_loss_difference": spread(_paired(runs, "val_loss")),
        "computed_tokens": {name: spread([run["computed_tokens"] for run in runs[name]]) for name in ORDERS},
        "tokens": runs["random"][0]["tokens"],
    }


def _paired(runs: dict[str, list[dict[str, Any]]], key: str) -> list[float]:
    """Grouped minus random, seed by seed."""
    return [ours[key] - theirs[key] for ours, theirs in zip(runs["grouped"], runs["random"], strict=True)]


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':10}{'held-out loss':>28}{'tokens computed':>20}{'seconds':>10}"]
    for name in ORDERS:
        loss, computed = result["val_loss"][name], result["computed_tokens"][name]["median"]
        seconds = sum(run["step_seconds"] for run in result["runs"][name]) / len(result["runs"][name])
        share = computed / result["tokens"]
        lines.append(f"{name:10}{_range(loss, '.4f'):>28}{computed:>12,.0f} ({share:.0%}){seconds:>10.0f}")
    difference, base = _range(result["val_loss_difference"], "+.4f"), result["base_val_loss"]
    lines += ["", f"grouped minus random, seed by seed: {difference}; the base's held-out loss: {base:.4f}"]
    return "\n".join([*lines, _how(result)])


def _how(result: dict[str, Any]) -> str:
    data, seeds = result["data"], len(result["runs"]["random"])
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"median (least to most) of {seeds} seeds; {result['epochs']} × {data['train']} rows of at most "
        f"{data['max_tokens']} tokens, {result['batch_size']} a step, {data['heldout']} held out; {result['date']}, "
        f"{result['threads']} threads, {result['hardware']['processor']}; {versions}"
    )


def _range(found: dict[str, Any], form: str) -> str:
    low, high = found["range"]
    return f"{found['median']:{form}} ({low:{form}} to {high:{form}})"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result goes")
    parser.add_argument("--epochs", type=int, default=1, metavar="N", help="passes over the rows (default 1)")
    parser.add_argument("--quick", action="store_true", help="a few rows and one seed; the figures mean nothing")
    given = parser.parse_args(words)
    result = result_of(QUICK if given.quick else FULL, given.epochs)
    file = given.json or (None if given.quick else RESULT)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
