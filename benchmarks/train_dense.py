"""Training on rows of one length, all supervised: no padding, no shared prefix, no token without a target to leave out.

python benchmarks/train_dense.py            print the table, write benchmarks/results/train_dense.json
python benchmarks/train_dense.py --quick    does it run?
"""

from __future__ import annotations

from comparison import Claim, command
from workloads import dense

if __name__ == "__main__":
    command(Claim("train_dense", dense, steps=6), __doc__)
