"""Training on chats: the demo's short ones, or with `--data live_multiple` those with whole JSON schemas before them.

python benchmarks/train_chats.py                          results/train_chats.json
python benchmarks/train_chats.py --data live_multiple     results/train_live_multiple.json
python benchmarks/train_chats.py --data live_multiple --steps 0 --rounds 1    one epoch over all 1053 rows: hours
"""

from __future__ import annotations

from comparison import Claim, arguments, run
from workloads import chats, live_multiple

CLAIMS = {
    "chats": Claim("train_chats", chats, steps=6),
    # The trainer needs minutes for what a loop does in one: once is enough to see by how much.
    "live_multiple": Claim(
        "train_live_multiple", live_multiple, steps=3, sides=("ours", "peft-best", "trl-tuned"), once=("trl-tuned",)
    ),
}

if __name__ == "__main__":
    parser = arguments((__doc__ or "").split("\n")[0])
    parser.add_argument("--data", choices=list(CLAIMS), default="chats")
    parser.add_argument("--rows", type=int, metavar="N", help="rows that each process goes through, instead of --steps")
    given = parser.parse_args()
    if given.rows is not None:
        given.steps = -(-given.rows // 8)
    run(CLAIMS[given.data], given)
