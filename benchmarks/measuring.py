"""How benchmarks measure: every side in turn, on fresh subjects, with medians and their spread.

A round runs each side once and turns their order round; the ratio of two sides is taken within a round, so that what
the machine does to one it does to the other. A sample is wall-clock seconds with Python's garbage collected before and
its collector off, as `timeit` has it: a collection costs what the whole process holds, not what is measured.
"""

from __future__ import annotations

import datetime as dt
import gc
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensor

from loratune.kernels import kernels_of
from loratune.model.device import device_name


@dataclass(frozen=True)
class Step:
    """Something done to a subject; timed where it has a name. `calls` at once where one is too short to time."""

    name: str
    act: Callable[[Any], object]
    calls: int = 1


@dataclass(frozen=True)
class Side:
    """One of those compared: how its subject is made (not timed), and the steps it goes through in order."""

    prepare: Callable[[], Any]
    steps: Sequence[Step]


@dataclass
class Samples:
    """Seconds of each step of each side, one for each round."""

    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, step: str, side: str, seconds: float) -> None:
        self.seconds.setdefault(step, {}).setdefault(side, []).append(seconds)


def measured(sides: Mapping[str, Side], repeats: int) -> dict[str, Any]:
    """Step → side → spread of its seconds, and `ratio`: the spread of every other side's seconds by the first's."""
    samples = Samples()
    names = list(sides)
    for number in range(-1, repeats):  # the round before the first warms up
        for name in names if number % 2 else reversed(names):
            _run(name, sides[name], samples if number >= 0 else Samples())
    found: dict[str, Any] = {}
    for step, by_side in samples.seconds.items():
        first, *others = (name for name in names if name in by_side)
        found[step] = {name: spread(by_side[name]) for name in (first, *others)}
        found[step]["ratio"] = {name: ratios(by_side[name], by_side[first]) for name in others}
    return found


def _run(name: str, side: Side, samples: Samples) -> None:
    subject = side.prepare()
    for step in side.steps:
        if not step.name:
            step.act(subject)
            continue
        gc.collect()
        gc.disable()
        try:
            start = time.perf_counter()
            for _ in range(step.calls):
                step.act(subject)
            samples.add(step.name, name, (time.perf_counter() - start) / step.calls)
        finally:
            gc.enable()


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles, least and most, and the values themselves; four digits are more than there are."""
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {
        "median": _rounded(middle),
        "quartiles": [_rounded(lower), _rounded(upper)],
        "range": [_rounded(min(values)), _rounded(max(values))],
        "samples": [_rounded(value) for value in values],
    }


def ratios(upper: Sequence[float], lower: Sequence[float]) -> dict[str, Any]:
    """The spread of upper/lower, round by round."""
    return spread([a / b for a, b in zip(upper, lower, strict=True)])


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def held(prepare: Callable[[], Any], act: Callable[[Any], object]) -> dict[str, int]:
    """Bytes that a subject holds more after `act`: in tensors (a shared storage once) and in Python's objects."""
    subject = prepare()
    gc.collect()
    tensors = _tensor_bytes()
    tracemalloc.start()
    kept = act(subject)
    gc.collect()
    objects = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    more = _tensor_bytes() - tensors
    del kept, subject
    return {"tensors": more, "objects": objects}


def _tensor_bytes() -> int:
    storages = {}
    for found in gc.get_objects():
        # isinstance would wake lazy modules; tensors that compiling left behind hold nothing.
        if issubclass(type(found), torch.Tensor) and not isinstance(found, FakeTensor):
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _commit() -> str | None:
    """The commit that is measured, with a plus where files differ from it."""
    here = Path(__file__).parent
    words = ["git", "-C", str(here), "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def surroundings(*packages: str, device: str = "cpu", threads: int | None = None) -> dict[str, Any]:
    """What the figures depend on besides the code: date, processor, how busy it was before, threads, versions."""
    return {
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "kernels": kernels_of(torch.device("cuda" if device == "cuda" else "cpu")).named,
        "hardware": {"cores": os.cpu_count(), "device": device, "processor": device_name(torch.device(device))},
        "load": _rounded(os.getloadavg()[0]),
        "threads": threads or torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in packages},
    }


def shown_seconds(seconds: float) -> str:
    """`1.23 s`, `45.6 ms` or `0.62 µs`: three digits of the unit that fits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError


def shown_bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
