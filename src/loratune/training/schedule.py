"""The learning rate of each step, a function of the step alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up to `peak` over `warmup` steps, then cosine or linear decay towards 0, or constant."""

    kind: Literal["cosine", "linear", "constant"]
    peak: float
    steps: int
    warmup: int

    def lr(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0; never 0, so that no step is without effect."""
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        if self.kind == "constant":
            return self.peak
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak * ((1 - done) if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
