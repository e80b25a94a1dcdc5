"""Training on chats under one system prompt of about 1000 tokens, 16 a step.

python benchmarks/train_shared_prefix.py               results/train_shared_prefix.json
python benchmarks/train_shared_prefix.py --steps 0     the whole epoch of --rows rows: an hour for the peers
"""

from __future__ import annotations

from functools import partial

from comparison import Claim, arguments, run
from workloads import shared_prefix

if __name__ == "__main__":
    parser = arguments((__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=500, metavar="N", help="rows of the epoch (default 500)")
    given = parser.parse_args()
    make = partial(shared_prefix, rows=given.rows)
    run(Claim("train_shared_prefix", make, steps=2, sides=("ours", "peft-best")), given)
