"""Training on rows of one length, all supervised: no padding, no shared prefix, no token without a target to leave out.

python benchmarks/train_dense.py            print the table, write benchmarks/results/train_dense.json
python benchmarks/train_dense.py --quick    does it run?
python benchmarks/train_dense.py --device cuda --model-shape smollm2-1.7b --length 4096    rows that fill a GPU
"""

from __future__ import annotations

from functools import partial

from comparison import Claim, arguments, run
from workloads import LENGTH, dense

if __name__ == "__main__":
    parser = arguments((__doc__ or "").split("\n")[0])
    parser.add_argument("--length", type=int, default=LENGTH, metavar="N", help=f"of a row (default {LENGTH})")
    given = parser.parse_args()
    name = "train_dense" if given.length == LENGTH else f"train_dense_{given.length}"
    run(Claim(name, partial(dense, length=given.length), steps=6), given)
