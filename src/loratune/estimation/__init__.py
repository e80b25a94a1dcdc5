"""The accounting, from configs alone: parameters, memory, arithmetic, time."""

from loratune.estimation.memory import (
    MemoryEstimate,
    Shape,
    activation_bytes_per_token,
    estimate_memory,
    step_flops,
)
from loratune.estimation.speed import STEP_SHARE, matmul_rate

__all__ = [
    "STEP_SHARE",
    "MemoryEstimate",
    "Shape",
    "activation_bytes_per_token",
    "estimate_memory",
    "matmul_rate",
    "step_flops",
]
