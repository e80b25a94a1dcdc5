"""The clock of one process: wall seconds of each step, its loss, and the most memory since the base was loaded."""

from __future__ import annotations

import importlib.metadata
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from job import Job, Report

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Clock:
    """Told when the base is loaded and when each step is done; a step begins where the one before it ended."""

    def __init__(self, job: Job, warm_steps: int) -> None:
        self._cuda = job.device.startswith("cuda")
        self._warm_steps = warm_steps
        self._seconds: list[float] = []
        self._losses: list[float] = []
        self._memory: dict[str, int] = {}
        self._begun = 0.0
        self.notes: dict[str, Any] = {}

    def loaded(self) -> None:
        """The base stands in memory; what loading needed is not counted."""
        self._memory["base_rss"] = psutil.Process().memory_info().rss
        _forget_peak()
        if self._cuda:
            torch.cuda.synchronize()
            self._memory["base_allocated"] = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def begin(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        self._begun = time.perf_counter()

    def step(self, loss: float | None = None) -> None:
        """One optimizer step is done; a side that learns its losses later gives them to `losses`."""
        if self._cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._seconds.append(now - self._begun)
        self._begun = now
        if loss is not None:
            self._losses.append(loss)

    def losses(self, found: list[float]) -> None:
        self._losses = list(found)

    def live(self, step: Callable[[], object]) -> None:
        """Do one more step and note the most bytes that it holds beyond what stood before it."""
        self._memory["live"] = live_bytes(step, cuda=self._cuda)

    def freeze_memory(self) -> None:
        """Note the peaks up to now: what comes after (a traced step) has costs of its own."""
        self._memory["peak_rss"] = peak_rss()
        if self._cuda:
            self._memory["peak_allocated"] = torch.cuda.max_memory_allocated()
            self._memory["peak_reserved"] = torch.cuda.max_memory_reserved()

    def report(self, *packages: str) -> Report:
        if "peak_rss" not in self._memory:
            self.freeze_memory()
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)}
        warm = self._warm_steps
        return Report(self._seconds[warm:], self._losses[warm:], self._memory, versions, self.notes)


def live_bytes(step: Callable[[], object], *, cuda: bool) -> int:
    """The most bytes of tensors that `step` holds beyond what stood before it."""
    if cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    # The allocator itself reports each allocation and release, temporaries inside a kernel included, which a dispatch
    # mode or saved-tensor hooks never see. Only the raw events have all of them: `events()` keeps those outside ops.
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def peak_rss() -> int:
    """The most bytes resident since `_forget_peak`; where the system cannot forget, since the process began."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _forget_peak() -> None:
    """Loading casts and copies: a peak of its own, often above the training's."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return
