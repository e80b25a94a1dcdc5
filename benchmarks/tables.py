"""The README's table of measured results, made from the committed JSON.

python benchmarks/tables.py          print it
python benchmarks/tables.py --write  put it between the markers in README.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "benchmarks" / "results" / "demo.json"
ADAPTERS = ROOT / "benchmarks" / "results" / "adapters.json"
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


def measured() -> str:
    """All that stands between the markers."""
    demo, adapters = (json.loads(path.read_text(encoding="utf-8")) for path in (DEMO, ADAPTERS))
    return f"{demo_table(demo)}\n\n{adapters_line(adapters)}"


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
