"""The accounting, from configs alone: parameters, memory, arithmetic, time."""

from loratune.estimation.memory import (
    BaseMemory,
    MemoryEstimate,
    Pass,
    Shape,
    bytes_per_token,
    estimate_memory,
    step_flops,
)
from loratune.estimation.speed import RECOMPUTED_FORWARDS, STEP_FORWARDS, forward_rate, matmul_rate

__all__ = [
    "RECOMPUTED_FORWARDS",
    "STEP_FORWARDS",
    "BaseMemory",
    "MemoryEstimate",
    "Pass",
    "Shape",
    "bytes_per_token",
    "estimate_memory",
    "forward_rate",
    "matmul_rate",
    "step_flops",
]
