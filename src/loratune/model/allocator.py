"""What the C library does with large pieces of memory that are freed."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# `mallopt`'s parameters in glibc's malloc.h, and the values that glibc itself ends at for programs with large buffers.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_USUAL = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
_KEEPING = {_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: (1 << 31) - 1}


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Inside the block glibc keeps what is freed for the next tensor; after it the memory goes back to the system.

    A training step frees and takes the same large buffers again and again, and each time the system would hand them out
    page by page. Does nothing for other devices and other C libraries.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    _set(libc, _KEEPING)
    try:
        yield
    finally:
        _set(libc, _USUAL)
        libc.malloc_trim(0)


def give_freed_memory_back() -> None:
    """What was freed goes back to the system, also from between pieces that are still held. For glibc only."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _set(libc: ctypes.CDLL, values: dict[int, int]) -> None:
    for parameter, value in values.items():
        libc.mallopt(parameter, value)
