"""What this machine could do at best: `python floor.py BASE DEVICE DTYPE RESULT` measures its matrix products.

A LoRA step needs 4P floating-point operations a token: 2P forward, 2P for the gradients of the inputs.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from weights import DTYPES

REPEATS, ROUNDS = 20, 7


def rate(hidden: int, intermediate: int, device: str, dtype: torch.dtype) -> float:
    """Operations a second of (tokens, hidden) × (hidden, intermediate), the best of some rounds."""
    tokens = 8192 if device.startswith("cuda") else 1024
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    weight = torch.randn(intermediate, hidden, device=device, dtype=dtype)
    return 2 * tokens * hidden * intermediate / min(_seconds(x, weight) for _ in range(ROUNDS))


def _seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    y = torch.nn.functional.linear(x, weight)
    float(y[0, 0])  # waits for an asynchronous device
    begun = time.perf_counter()
    for _ in range(REPEATS):
        y = torch.nn.functional.linear(x, weight)
    float(y[0, 0])
    return (time.perf_counter() - begun) / REPEATS


def main() -> None:
    base, device, dtype, result = sys.argv[1:]
    config = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))
    found = rate(config["hidden_size"], config["intermediate_size"], device, DTYPES[dtype])
    Path(result).write_text(json.dumps({"flops": found}), encoding="utf-8")


if __name__ == "__main__":
    main()
