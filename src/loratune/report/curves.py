"""Number series from the metrics of a run: what the figures draw and the headline compares."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loratune.report.folder import Metric, Run

# More points than this are finer than the pixels they are drawn on.
POINTS = 600
_SMOOTHED_FROM = 8


@dataclass(frozen=True)
class Series:
    """Finite values by step, steps ascending."""

    steps: tuple[float, ...] = ()
    values: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps)


@dataclass(frozen=True)
class Curves:
    """Everything that is drawn over steps.

    Attributes:
        base: held-out loss of the base model, without the adapter.
        not_finite: steps whose loss, held-out loss or gradient norm is infinite or not a number.
        repeated: how often a training step was logged again: a resumed run redoes the steps after its checkpoint.
    """

    loss: Series
    held_out: Series
    base: float | None
    lr: Series
    grad_norm: Series
    speed: Series
    memory: Series
    not_finite: tuple[int, ...]
    repeated: int


def curves_of(run: Run) -> Curves:
    metrics = run.metrics or ()
    base = _finite(run.record.result.base_val_loss)
    held_out = _series(metrics, lambda metric: metric.val_loss)
    if base is None and held_out and held_out.steps[0] == 0:
        base = held_out.values[0]
    if base is not None and not (held_out and held_out.steps[0] == 0):
        held_out = Series((0, *held_out.steps), (base, *held_out.values))
    logged = [metric.step for metric in metrics if metric.loss is not None and metric.step is not None]
    return Curves(
        loss=_series(metrics, lambda metric: metric.loss),
        held_out=held_out,
        base=base,
        lr=_series(metrics, lambda metric: metric.lr),
        grad_norm=_series(metrics, lambda metric: metric.grad_norm),
        speed=_series(metrics, _tokens_per_second),
        memory=_series(metrics, lambda metric: metric.peak_memory_bytes),
        not_finite=tuple(sorted({metric.step for metric in metrics if metric.step is not None and _is_lost(metric)})),
        repeated=len(logged) - len(set(logged)),
    )


@dataclass(frozen=True)
class Outcome:
    """Held-out loss before and after; from the record, or from the metrics of a run that has not ended."""

    base: float | None
    tuned: float | None
    steps: int
    planned: int | None


def outcome_of(run: Run, curves: Curves) -> Outcome:
    result = run.record.result
    tuned = _finite(result.val_loss)
    later = [value for step, value in zip(curves.held_out.steps, curves.held_out.values, strict=True) if step > 0]
    if tuned is None and later:
        tuned = min(later)
    done = int(curves.loss.steps[-1]) if curves.loss else 0
    return Outcome(curves.base, tuned, result.steps if result.steps is not None else done, run.record.plan.steps)


def smooth(series: Series) -> Series:
    """Gaussian-weighted means over a thirty-second of the curve; centred, so the smooth line does not lag behind."""
    series = thin(series)
    count = len(series.steps)
    if count < _SMOOTHED_FROM:
        return series
    sigma = max(1.0, count / 32)
    reach = math.ceil(3 * sigma)
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-reach, reach + 1)]
    values = []
    for middle in range(count):
        first, last = max(0, middle - reach), min(count, middle + reach + 1)
        window = weights[first - middle + reach : last - middle + reach]
        total = sum(w * v for w, v in zip(window, series.values[first:last], strict=True))
        values.append(total / sum(window))
    return Series(series.steps, tuple(values))


def thin(series: Series) -> Series:
    """At most `POINTS` points: the mean of each stretch of steps."""
    return _by_stretch(series, POINTS, lambda values: (sum(values) / len(values),))


def extremes(series: Series) -> Series:
    """At most `POINTS` points that keep the outline: lowest and highest of each stretch of steps."""
    return _by_stretch(series, POINTS // 2, lambda values: (min(values), max(values)))


def _by_stretch(series: Series, stretches: int, reduce: Callable[[Sequence[float]], tuple[float, ...]]) -> Series:
    count = len(series.steps)
    if count <= POINTS:
        return series
    steps: list[float] = []
    values: list[float] = []
    for number in range(stretches):
        first, last = count * number // stretches, count * (number + 1) // stretches
        for value in reduce(series.values[first:last]):
            steps.append(sum(series.steps[first:last]) / (last - first))
            values.append(value)
    return Series(tuple(steps), tuple(values))


def _series(metrics: Sequence[Metric], value_of: Callable[[Metric], float | None]) -> Series:
    by_step: dict[int, float] = {}
    for metric in metrics:
        value = _finite(value_of(metric))
        if metric.step is not None and value is not None:
            by_step[metric.step] = value
    steps = tuple(sorted(by_step))
    return Series(steps, tuple(by_step[step] for step in steps))


def _tokens_per_second(metric: Metric) -> float | None:
    if metric.tokens is None or not metric.step_seconds:
        return None
    return metric.tokens / metric.step_seconds


def _is_lost(metric: Metric) -> bool:
    return any(
        value is not None and not math.isfinite(value) for value in (metric.loss, metric.val_loss, metric.grad_norm)
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
