"""Runs a loop of `examples/loops` as a person would, then writes what it left in memory.

python after_loop.py FILE SCRIPT [its arguments]
"""

from __future__ import annotations

import runpy
import sys

import torch

from tests.adapter.cases import IDS


def main() -> None:
    target, *sys.argv = sys.argv[1:]
    left = runpy.run_path(sys.argv[0], run_name="__main__")
    model, lora = left["model"].eval(), left["lora"]
    # Trainers leave autocast and their own forward around the model's.
    with torch.no_grad():
        logits = type(model).forward(model, IDS).logits
    torch.save({"losses": left["losses"], "base": lora.base_state(), "logits": logits}, target)


if __name__ == "__main__":
    main()
