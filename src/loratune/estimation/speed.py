"""How fast this machine multiplies, measured rather than looked up."""

from __future__ import annotations

import time

import torch
from torch import Tensor

# Share of the bare matrix product's rate that a whole training step reaches.
STEP_SHARE = 0.4


def matmul_rate(device: torch.device, dtype: torch.dtype, *, width: int = 1024) -> float:
    """Floating-point operations a second of a (512, width) × (width, width) product."""
    a = torch.randn(512, width, device=device, dtype=dtype)
    b = torch.randn(width, width, device=device, dtype=dtype)
    return 2 * 512 * width * width / min(_seconds(a, b) for _ in range(6))


def _seconds(a: Tensor, b: Tensor, repeats: int = 4) -> float:
    c = a @ b
    start = time.perf_counter()
    for _ in range(repeats):
        c = a @ b
    float(c[0, 0])  # waits for an asynchronous device
    return (time.perf_counter() - start) / repeats
