"""Freed memory stays with the process while a run lasts, and goes back after it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune.model import allocator, freed_memory_kept

GLIBC = platform.libc_ver()[0] == "glibc" and Path("/proc/self/statm").exists()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_kept_inside_and_given_back_after() -> None:
    size = 300 << 20
    before = resident()
    with freed_memory_kept(torch.device("cpu")):
        held = torch.ones(size, dtype=torch.uint8)
        del held
        inside = resident()
    assert inside - before > 0.9 * size
    assert resident() - before < 0.1 * size


def test_given_back_after_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    class Libc:
        def mallopt(self, parameter: int, value: int) -> int:
            calls.append((parameter, value))
            return 1

        def malloc_trim(self, pad: int) -> int:
            calls.append((0, pad))
            return 1

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda *_: Libc())
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("glibc", "2.36"))
    with pytest.raises(ValueError, match="stop"), freed_memory_kept(torch.device("cpu")):
        raise ValueError("stop")
    assert len(calls) == 5
    assert calls[-1] == (0, 0)
    assert all(after < before for (_, before), (_, after) in zip(calls[:2], calls[2:4], strict=True))


@pytest.mark.parametrize(("device", "libc"), [("cuda", "glibc"), ("cpu", "")])
def test_nothing_elsewhere(device: str, libc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("touched")

    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: (libc, ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", refuse)
    with freed_memory_kept(torch.device(device)):
        pass
