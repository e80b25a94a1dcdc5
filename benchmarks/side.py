"""One side in one process: `python side.py JOB RESULT`. Peers may run under an interpreter that has no loratune.

A side is a module with `train(job, workload, clock)`: it loads base and adapter, goes through the warm-up's rows and
then through the workload's rows once, and tells the clock of each optimizer step.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

sys.path.insert(0, str(Path(__file__).resolve().parent))


@dataclass(frozen=True)
class Kind:
    """A side: its module, how tables call it, the package that it needs, and whose versions it reports."""

    module: str
    label: str
    needs: str
    packages: tuple[str, ...]


SIDES = {
    "ours": Kind("side_ours", "loratune", "loratune", ("loratune",)),
    "peft": Kind("side_peft", "peft, plain loop", "peft", ("peft",)),
    "peft-best": Kind("side_peft", "strongest peft loop", "peft", ("peft",)),
    "trl": Kind("side_trl", "TRL, defaults", "trl", ("peft", "trl")),
    "trl-tuned": Kind("side_trl", "TRL, tuned", "trl", ("peft", "trl")),
}


def main() -> None:
    from clock import Clock
    from job import Job, Workload, in_batches

    job = Job.read(sys.argv[1])
    workload = Workload.read(job.workload)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    kind = SIDES[job.side]
    clock = Clock(job, len(in_batches(workload.warm, workload.batch_size)))
    importlib.import_module(kind.module).train(job, workload, clock)
    clock.report(*kind.packages).write(Path(sys.argv[2]))


if __name__ == "__main__":
    main()
