"""What the training benchmarks have in common: parity first, then rounds, then one JSON file and one table."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import parity
import weights
from alternate import Machine, rounds, summary
from job import Job, Workload
from measuring import shown_seconds, surroundings
from side import SIDES
from workloads import WARM_STEPS

RESULTS = Path(__file__).resolve().parent / "results"
CURVE_STEPS = 4


@dataclass(frozen=True)
class Claim:
    """One workload, and how much of it is measured where nobody says otherwise.

    Attributes:
        make: (tokenizer, steps) → workload; 0 steps are the whole epoch.
        sides: compared by default. once: those of them too slow for every round.
    """

    name: str
    make: Callable[[Any, int], Workload]
    steps: int
    sides: tuple[str, ...] = tuple(SIDES)
    once: tuple[str, ...] = ()


def arguments(about: str) -> argparse.ArgumentParser:
    """The options of every training benchmark."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument(
        "--quick", action="store_true", help="two short steps, one round, the strongest peer: does it run?"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="measured steps of each process; 0 for the whole epoch")
    parser.add_argument("--sides", type=_names, metavar="A,B", help=f"of {','.join(SIDES)}; ours is always there")
    parser.add_argument("--once", type=_names, metavar="A,B", help="sides that run in the first round only")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--dtype", default="bf16", choices=sorted(weights.DTYPES), help="of the base (default bf16)")
    parser.add_argument("--model-shape", default=weights.REAL, choices=[weights.REAL, *weights.SHAPES])
    parser.add_argument(
        "--micro-batch", type=int, metavar="N", help="rows that peers take at once (default: by workload)"
    )
    parser.add_argument("--lr", type=float, default=1e-3, help="(default 0.001)")
    common(parser)
    return parser


def common(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark that starts processes."""
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default 3)")
    parser.add_argument(
        "--peer-python", default=sys.executable, metavar="PATH", help="interpreter that has peft and trl"
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="OMP_NUM_THREADS (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result goes")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    unknown = [name for name in names if name not in SIDES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no side {', '.join(unknown)}; there are {', '.join(SIDES)}")
    return names


def run(claim: Claim, given: argparse.Namespace) -> dict[str, Any]:
    """Measure one claim, write its result, print its table.

    Raises:
        SystemExit: something is missing, a side failed, or the gradients do not agree.
    """
    chosen = given.sides if given.sides is not None else ("peft-best",) if given.quick else claim.sides
    sides = tuple(dict.fromkeys(("ours", *chosen)))
    once = given.once if given.once is not None else claim.once
    steps = given.steps if given.steps is not None else (2 if given.quick else claim.steps)
    with machine_of(given) as machine:
        job = started(machine, given)
        machine.refuse_missing(sides)
        workload = claim.make(weights.tokenizer(), steps)
        if given.micro_batch is not None:
            workload = replace(workload, micro_batch=given.micro_batch)
        if given.quick:
            workload = shortened(workload, steps)
        if job.device.startswith("cuda"):  # kernels are chosen and compiled for each shape
            workload = replace(workload, warm=workload.rows[: WARM_STEPS * workload.batch_size])
        agreement = agreed(machine, job, workload)
        job = replace(job, workload=str(workload.write(machine.place / "workload.json")))
        found = rounds(machine, job, sides, once, 1 if given.quick else given.rounds, say)
        model = weights.facts(Path(job.base), given.model_shape)
        result = {
            **surroundings("loratune", "torch", "transformers", device=given.device, threads=given.threads),
            "model": model,
            "workload": facts(workload),
            "settings": {name: getattr(job, name) for name in ("dtype", "lr", "clip", "seed", "r", "alpha")},
            "quick": given.quick,
            "rounds": len(found),
            "parity": agreement,
            **summary(found, workload, model["multiplied"]),
        }
    write(result, given, file_name(claim, given))
    print(table(result))
    return result


@contextlib.contextmanager
def machine_of(given: argparse.Namespace) -> Iterator[Machine]:
    """A place for the processes' files."""
    with tempfile.TemporaryDirectory() as folder:
        yield Machine(Path(folder), given.peer_python, given.threads)


def started(machine: Machine, given: argparse.Namespace) -> Job:
    """A job that names base and adapter, which are written first."""
    base = weights.write_base(given.model_shape, machine.place / "base")
    job = Job("ours", str(base), str(machine.place / "adapter"), "", given.device, given.dtype, given.lr)
    weights.write_adapter(base, Path(job.adapter), r=job.r, alpha=job.alpha)
    return job


def shortened(workload: Workload, steps: int) -> Workload:
    """Steps of one micro-batch: enough to see that everything runs."""
    size = workload.micro_batch
    warm, rows = workload.warm[: WARM_STEPS * size], workload.rows[: steps * size]
    return replace(workload, batch_size=size, warm=warm, rows=rows)


def agreed(machine: Machine, job: Job, workload: Workload) -> dict[str, Any]:
    """Gradients of step one against the reference, then the loss of some steps in the same order, side by side."""
    few = replace(workload, warm=[], rows=parity.parity_rows(workload.rows))
    job = replace(job, workload=str(few.write(machine.place / "parity_rows.json")))
    deviations = machine.parity(job)
    say(f"parity: {parity.shown(deviations)}")
    size = workload.micro_batch
    few = replace(workload, warm=[], rows=workload.rows[: CURVE_STEPS * size], batch_size=size)
    job = replace(job, workload=str(few.write(machine.place / "curve.json")), order="given")
    curves = {side: machine.report(replace(job, side=side)).losses for side in ("ours", "peft-best")}
    apart = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
    say(f"losses of {len(curves['ours'])} steps in the same order: at most {apart:.4f} apart")
    return {"gradients": deviations, "losses": curves, "losses_apart": apart}


def facts(workload: Workload) -> dict[str, Any]:
    return {
        "name": workload.name,
        "rows": len(workload.rows),
        "tokens": workload.tokens,
        "supervised": workload.supervised,
        "longest": max(len(row.ids) for row in workload.rows),
        "batch_size": workload.batch_size,
        "micro_batch_of_peers": workload.micro_batch,
    }


def file_name(claim: Claim, given: argparse.Namespace) -> str:
    """On a GPU or of another model a result has a name of its own."""
    other = [given.model_shape] if given.model_shape != weights.REAL else []
    return "_".join([claim.name, *other, *(["cuda"] if given.device.startswith("cuda") else [])])


def write(result: dict[str, Any], given: argparse.Namespace, name: str) -> None:
    """Where asked, else among the results; a quick run's only where asked."""
    if given.quick and given.json is None:
        return
    path = given.json or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    head = ("tokens/s", "supervised/s", "examples/s", "of floor", "step", "peak", "over base", "ours is")
    lines = [f"{'':22}" + "".join(f"{word:>14}" for word in head)]
    for name, side in result["sides"].items():
        memory = side["memory"]
        peak = memory.get("peak_allocated", memory["peak_rss"])["median"]
        ratio = result["ratios"].get(name)
        cells = (
            f"{side['tokens_per_second']['median']:.0f}",
            f"{side['supervised_per_second']['median']:.1f}",
            f"{side['examples_per_second']['median']:.2f}",
            f"{side['floor_share']['median']:.0%}",
            shown_seconds(side["step_seconds"]["median"]),
            f"{peak / 1e9:.2f} GB",
            f"{memory['over_base']['median'] / 1e9:.2f} GB",
            f"{ratio['median']:.2f}×" if ratio else "",
        )
        spread = f"  ({ratio['range'][0]:.2f} to {ratio['range'][1]:.2f})" if ratio else ""
        lines.append(f"{side['label']:22}" + "".join(f"{cell:>14}" for cell in cells) + spread)
    return "\n".join([*lines, "", *_how(result)])


def _how(result: dict[str, Any]) -> list[str]:
    floor, work = result["floor"], result["workload"]
    rate, tokens = floor["flops"]["median"], floor["tokens_per_second"]["median"]
    least = f"floor: 4 × {result['model']['multiplied'] / 1e6:.1f} M operations a token"
    what = f"{work['name']}: {work['rows']} rows, {work['tokens']:,} tokens, {work['supervised']:,} supervised"
    how = f"medians of {result['rounds']} rounds in fresh processes, ratios within a round (least to most)"
    where = f"{result['threads']} threads, {result['hardware']['processor']}"
    return [
        f"{least} at {rate / 1e9:.0f} GFLOP/s make {tokens:.0f} tokens/s",
        f"{what}, {work['batch_size']} rows a step; {how}; {where}",
    ]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def command(claim: Claim, about: str | None, given: Sequence[str] | None = None) -> None:
    run(claim, arguments((about or "").split("\n")[0]).parse_args(given))
