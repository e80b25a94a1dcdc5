"""How fast this machine multiplies, measured rather than looked up."""

from __future__ import annotations

import time

import torch

# Share of the bare matrix product's rate that a whole training step reaches.
STEP_SHARE = 0.4


def matmul_rate(device: torch.device, dtype: torch.dtype, *, width: int = 1024) -> float:
    """Floating-point operations a second of a (512, width) × (width, width) product; takes under a tenth of a second."""
    a, b = torch.randn(512, width, device=device, dtype=dtype), torch.randn(width, width, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(4):
            c = a @ b
        float(c[0, 0])  # waits for an asynchronous device
        best = min(best, (time.perf_counter() - start) / 4)
    return 2 * 512 * width * width / best
