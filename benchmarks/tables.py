"""The README's table of measured results, made from the committed JSON.

python benchmarks/tables.py          print it
python benchmarks/tables.py --write  put it between the markers in README.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured: benchmarks/tables.py -->", "<!-- /measured -->"


def demo_table(result: dict[str, Any]) -> str:
    """Base against tuned model of `make demo`, as Markdown."""
    base, tuned = result["scores"]["base"], result["scores"]["tuned"]
    losses = result["held_out_loss"]
    lines = [
        f"| {base['rows']} calls of functions never trained on | base | tuned |",
        "|---|---:|---:|",
        f"| valid JSON call | {base['valid']:.0%} | {tuned['valid']:.0%} |",
        f"| right function | {base['name']:.0%} | {tuned['name']:.0%} |",
        f"| exact call | {base['exact']:.0%} | {tuned['exact']:.0%} |",
        f"| loss on their answers | {losses['base']:.3f} | {losses['tuned']:.3f} |",
        "",
        _how(result),
    ]
    return "\n".join(lines)


def _how(result: dict[str, Any]) -> str:
    data, measured, hardware = result["data"], result["measured"], result["hardware"]
    work = f"{data['rows']} rows, {data['tokens']:,} tokens, one epoch: {measured['seconds']:.0f} s of training"
    machine = f"{hardware['cores']} cores ({hardware['processor']})"
    return f"{work} on {machine}, {measured['tokens_per_second']:.0f} tokens/s."


def adapters_line(result: dict[str, Any]) -> str:
    """What handling adapters costs beside peft, in one sentence."""
    steps = result["steps"]

    def times(name: str) -> str:
        return f"{steps[name]['ratio']['peft']['median']:.1f}×"

    def median(name: str, who: str) -> float:
        return float(steps[name][who]["median"])

    switch = "switch ×2, 20 adapters, 32 layers"
    ours, theirs = median(switch, "ours") / 2, median(switch, "peft") / 2
    growth = median("add the 20th", "ours") / median("add the 2nd", "ours")
    return (
        f"Handling adapters beside peft {result['versions']['peft']} (32 layers, 224 targets, one run): attach "
        f"{times('attach')} as fast, load {times('load')}; the 20th adapter takes {growth:.1f}× the time of the 2nd; "
        f"switching among 20 takes {ours * 1e6:.1f} µs against {theirs * 1e3:.0f} ms "
        "([all of it](benchmarks/results/adapters.json))."
    )


WORKLOADS = {
    "dense": "rows of 256 tokens, all supervised",
    "dense_4096": "rows of 4,096 tokens, all supervised",
    "chats": "short function-calling chats",
    "live_multiple": "chats with the functions' JSON schemas",
    "shared_prefix": "chats under one long system prompt",
}
SERVING = {
    "peft, mixed batch": "in mixed batches",
    "peft, mixed batch, sorted": "in mixed batches sorted by the lengths of answers not given yet",
    "peft, switching": "switching for each request",
}
PEERS = ("peft-best", "peft", "trl-tuned", "trl")


def training_table(results: Sequence[dict[str, Any]]) -> str:
    """Tokens a second of each side, and how many times a peer's rate ours is, as Markdown."""
    sides = ["ours", *(peer for peer in PEERS if any(peer in result["sides"] for result in results))]
    labels = {name: side["label"] for result in results for name, side in result["sides"].items()}
    lines = [
        f"| training, tokens/s | {' | '.join(labels[side] for side in sides)} |",
        f"|---|{'---:|' * len(sides)}",
    ]
    for result in results:
        cells = " | ".join(_training_cell(result, side) for side in sides)
        lines.append(f"| {_training_name(result)} | {cells} |")
    versions: dict[str, str] = {}
    for side in (side for result in results for side in result["sides"].values()):
        versions |= side["versions"]
    peers = ", ".join(f"{name} {versions[name]}" for name in ("peft", "trl") if name in versions)
    # A slow peer may have run in the first round only.
    rates = [side["tokens_per_second"] for result in results for side in result["sides"].values()]
    rounds = sorted({len(rate["samples"]) for rate in rates})
    times = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    dates = sorted({result["date"] for result in results})
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    threads = " or ".join(str(number) for number in sorted({result["threads"] for result in results}))
    machines = " and ".join(dict.fromkeys(result["hardware"]["processor"] for result in results))
    how = f"medians of {times} rounds, ratios within a round; {machines}, {threads} threads, {days}; {peers}"
    return "\n".join([*lines, "", f"In brackets how many times as fast loratune is: {how}."])


def _training_name(result: dict[str, Any]) -> str:
    shape, device = result["model"]["shape"], result["hardware"]["device"]
    where = result["hardware"]["processor"]
    name = WORKLOADS.get(result["workload"]["name"], result["workload"]["name"])
    others = [f"shape of {shape}"] if result["model"]["weights"] == "random" else []
    return ", ".join([name, *others, *([where] if device != "cpu" else [])])


def _training_cell(result: dict[str, Any], side: str) -> str:
    if side not in result["sides"]:
        return ""
    rate = f"{result['sides'][side]['tokens_per_second']['median']:,.0f}"
    ratio = result["ratios"].get(side)
    return f"{rate} ({ratio['median']:.1f}×)" if ratio else rate


def memory_line(result: dict[str, Any]) -> str:
    """What a step holds beside the strongest peft loop, and how it grows."""
    live = {side: found["live"]["median"] for side, found in result["step"].items()}
    grown = ", ".join(f"{name}: ×{factors['ours']:.2f}" for name, factors in result["factors"].items())
    return (
        f"Memory of a step of 4 × 256 tokens beyond weights and optimizer: {live['ours'] / 2**20:.0f} MiB against "
        f"{live['peft-best'] / 2**20:.0f} of the strongest peft loop. It grows, {grown} "
        "([all of it](benchmarks/results/memory.json))."
    )


def methods_table(result: dict[str, Any]) -> str:
    """What LoRA, QLoRA and full fine-tuning cost and give on one task, as Markdown; a mean over the seeds."""
    base, methods = result["base"], result["methods"]
    heads = " | ".join(f"`--method {name}`" for name in methods)
    rows = [
        ("held-out loss", "val_loss", lambda value: f"{value:.4f}"),
        ("exact calls", "exact_match", lambda value: f"{value:.0%}"),
        ("loss on other text", "elsewhere_loss", lambda value: f"{value:.3f}"),
        ("trained parameters", "trainable", lambda value: f"{value / 1e6:.1f} M"),
        ("peak memory of the process", "peak_memory_bytes", lambda value: f"{value / 1e9:.2f} GB"),
        ("adapter on disk", "adapter_bytes", lambda value: f"{value / 1e6:.0f} MB"),
    ]
    lines = [f"| `loratune compare` | base | {heads} |", f"|---|---:|{'---:|' * len(methods)}"]
    for name, key, text in rows:
        cells = [text(method["summary"][key]["mean"]) for method in methods.values()]
        lines.append(f"| {name} | {text(base[key]) if key in base else ''} | {' | '.join(cells)} |")
    # The faster run: what else a machine does can only slow one down.
    fastest = [f"{min(run['seconds'] for run in method['runs']):.0f} s" for method in methods.values()]
    lines.append(f"| training, the faster seed | | {' | '.join(fastest)} |")
    counts, seeds = result["rows"], len(next(iter(methods.values()))["runs"])
    tokens = next(iter(methods.values()))["runs"][0]["curve"][-1]["tokens"]
    how = (
        f"{counts['train']} chats, {tokens:,} tokens, one epoch, {seeds} seeds, each method at the best rate found; "
        f"{counts['held_out']} held-out chats of functions never trained on"
    )
    verdict = result["verdict"]["text"]
    return "\n".join([*lines, "", f"{verdict}. {how} ([all of it](benchmarks/results/methods.json))."])


def heldout_line(result: dict[str, Any]) -> str:
    """What is learned in an epoch beside peft's loops, over the seeds."""

    def losses(side: str) -> str:
        low, high = result["losses"][side]["range"]
        return f"{result['losses'][side]['median']:.3f} ({low:.3f} to {high:.3f})"

    seeds = len(result["losses"]["ours"]["samples"])
    return (
        f"Loss on {result['data']['held_out']} held-out chats after one epoch of {result['data']['trained']}, "
        f"{seeds} seeds: {losses('ours')}, the strongest peft loop {losses('peft-best')}, peft's plain loop "
        f"{losses('peft')}, the base {result['base']:.3f} ([all of it](benchmarks/results/heldout.json))."
    )


def grouping_line(result: dict[str, Any]) -> str:
    """What grouping rows that begin alike saves, and what it does to the held-out loss."""
    shares = {name: found["median"] / result["tokens"] for name, found in result["computed_tokens"].items()}
    low, high = result["val_loss_difference"]["range"]
    return (
        f"Rows that begin alike in one step: {shares['grouped']:.0%} of the tokens are computed, in random order "
        f"{shares['random']:.0%}; the held-out loss differs by {result['val_loss_difference']['median']:+.3f} "
        f"({low:+.3f} to {high:+.3f}, {len(result['runs']['random'])} seeds; base "
        f"{result['base_val_loss']:.3f}; [all of it](benchmarks/results/grouping.json))."
    )


def startup_line(result: dict[str, Any]) -> str:
    seconds = {name: found["median"] for name, found in result["seconds"].items()}
    return (
        f"`loratune --help` takes {seconds['loratune --help']:.1f} s; from the command to the first step "
        f"{seconds['first step, loratune, unchecked']:.1f} s, {seconds['first step, loratune, checked']:.1f} s with "
        f"the fast checks, {seconds['first step, TRL']:.1f} s in TRL ([all of it](benchmarks/results/startup.json))."
    )


def serve_line(result: dict[str, Any]) -> str:
    """How many tokens a second the server answers beside peft, and how soon."""
    work, rates, first = result["work"], result["tokens_per_second"], result["first_token_seconds"]
    others = ", ".join(
        f"{rates[side]['median']:.0f} ({ratio['median']:.1f}×) {SERVING[side]}"
        for side, ratio in result["ratios"].items()
    )
    return (
        f"`loratune serve`, {work['adapters']} adapters on one base, {work['callers']} callers at once: "
        f"{rates['ours']['median']:.0f} tokens/s, the first one after {first['median']:.1f} s (95 % within "
        f"{first['p95']:.1f} s); peft: {others} ([all of it](benchmarks/results/serve.json))."
    )


def soak_line(result: dict[str, Any]) -> str:
    """What a thousand requests for adapters that come and go left behind."""
    return (
        f"{result['requests']:,} requests for adapters that were loaded and unloaded meanwhile "
        f"({result['unloads']} times by request): {result['answered']:,} answered, {len(result['wrong'])} other than "
        f"alone, memory {result['resident_growth']:+.1%} ([all of it](benchmarks/results/soak.json))."
    )


def measured(folder: Path = RESULTS) -> str:
    """All that stands between the markers: what there are results of."""
    parts = [demo_table(_read(folder / "demo.json"))]
    training = sorted(folder.glob("train_*.json"), key=_place)
    if training:
        parts.append(training_table([_read(path) for path in training]))
    if (folder / "methods.json").exists():
        parts.append(methods_table(_read(folder / "methods.json")))
    lines = {
        "heldout.json": heldout_line,
        "grouping.json": grouping_line,
        "memory.json": memory_line,
        "startup.json": startup_line,
        "adapters.json": adapters_line,
        "serve.json": serve_line,
        "soak.json": soak_line,
    }
    parts += [line(_read(folder / name)) for name, line in lines.items() if (folder / name).exists()]
    return "\n\n".join(parts)


def _place(path: Path) -> tuple[int, str]:
    """In the order of `WORKLOADS`, the real model on a CPU first."""
    name = path.stem.removeprefix("train_")
    return next((i for i, known in enumerate(WORKLOADS) if name.startswith(known)), len(WORKLOADS)), name


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def with_table(readme: str, table: str) -> str:
    """The README with what stands between the markers replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    table = measured()
    if not parser.parse_args().write:
        print(table)
        return
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main()
