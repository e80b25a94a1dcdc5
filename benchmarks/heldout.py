"""The loss on held-out rows after one epoch, ours beside peft's: is what is faster as good?

python benchmarks/heldout.py            print the table, write benchmarks/results/heldout.json
python benchmarks/heldout.py --quick    does it run?

The demo's short chats, some of them held out. For each seed every side starts from the same adapter (drawn from the
seed), goes through the same rows once, in an order of its own, with the same optimizer and rate; then the same code
evaluates all of them.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import weights
from alternate import Machine
from comparison import common, machine_of, say, started, write
from job import Job, Row, Workload
from measuring import spread, surroundings
from side import SIDES
from side_ours import rendered
from workloads import chats

import loratune as lt
from loratune.data.pack import Layout, batches
from loratune.evaluation import held_out_loss
from loratune.model import use_packed_attention

SIDES_COMPARED = ("ours", "peft-best", "peft")
HELD_OUT, TRAINED, SEEDS = 93, 240, 3


def split(rows: Sequence[Row], trained: int, held_out: int) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows, the same for every seed."""
    order = list(rows)
    random.Random(0).shuffle(order)
    return order[held_out : held_out + trained], order[:held_out]


def evaluated(model: Any, rows: Sequence[Row], adapter: str | None) -> float:
    """The loss of `rows` with an adapter, or of the base alone."""
    held_out = batches(rendered(rows), Layout.PACKED, limit=2048, pad_id=0)
    if adapter is None:
        return held_out_loss(model, held_out, model.device).loss
    handle = lt.attach(model, adapter)
    try:
        return held_out_loss(model, held_out, model.device).loss
    finally:
        handle.detach()


def trained(machine: Machine, job: Job, seed: int) -> dict[str, str]:
    """Side → the folder of its adapter."""
    place = machine.place / f"seed{seed}"
    start = weights.write_adapter(Path(job.base), place / "start", r=job.r, alpha=job.alpha, seed=seed)
    folders = {}
    for side in SIDES_COMPARED:
        folders[side] = str(place / side)
        report = machine.report(replace(job, side=side, seed=seed, adapter=str(start), saved=folders[side]))
        say(f"seed {seed}  {SIDES[side].label:22} {sum(report.seconds):6.1f} s")
    return folders


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':22}{'held-out loss':>14}   of each seed"]
    for side, losses in result["losses"].items():
        each = ", ".join(f"{loss:.4f}" for loss in losses["samples"])
        lines.append(f"{SIDES[side].label:22}{losses['median']:>14.4f}   {each}")
    data = result["data"]
    lines += ["", f"base {result['base']:.4f}; {data['trained']} rows once, {data['batch_size']} a step"]
    return "\n".join([*lines, f"{data['held_out']} rows held out"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, a few rows: does it run? Nothing to publish")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"(default {SEEDS})")
    parser.set_defaults(device="cpu", dtype="bf16", lr=1e-3, model_shape=weights.REAL)
    common(parser)
    given = parser.parse_args()
    with machine_of(given) as machine:
        machine.refuse_missing(SIDES_COMPARED)
        job = started(machine, given)
        everything = chats(weights.tokenizer(), 0)
        train, held_out = split(everything.rows, 8 if given.quick else TRAINED, 8 if given.quick else HELD_OUT)
        workload = Workload("chats", 8, 8, [], train)
        job = replace(job, workload=str(workload.write(machine.place / "workload.json")))
        model = weights.load_model(job.base, job.dtype, job.device)
        use_packed_attention(model)
        torch.set_num_threads(given.threads)
        losses: dict[str, list[float]] = {side: [] for side in SIDES_COMPARED}
        for seed in range(1, (1 if given.quick else given.seeds) + 1):
            for side, folder in trained(machine, job, seed).items():
                losses[side].append(evaluated(model, held_out, folder))
        base = evaluated(model, held_out, None)
    result = {
        **surroundings("loratune", "peft", "torch", "transformers", device=given.device, threads=given.threads),
        "model": "SmolLM2-135M-Instruct",
        "data": {"trained": len(train), "held_out": len(held_out), "batch_size": workload.batch_size},
        "base": base,
        "losses": {side: spread(found) for side, found in losses.items()},
    }
    write(result, given, "heldout")
    print(table(result))


if __name__ == "__main__":
    main()
