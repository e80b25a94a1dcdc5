"""Recognising that memory ran out, and getting it back."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from loratune.errors import OutOfMemoryError


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has an exception of its own; on the CPU it is a RuntimeError that names the allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns whatever says that memory ran out into an `OutOfMemoryError`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).strip().partition("\n")[0]
        hint = "lower --micro-batch-tokens or --max-length, or use --recompute on"
        raise OutOfMemoryError(f"out of memory: {said}" if said else "out of memory", hint=hint) from error


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
