"""The series behind the figures."""

from __future__ import annotations

import pytest

from loratune.report.curves import POINTS, Series, curves_of, extremes, outcome_of, smooth, thin
from loratune.report.folder import Metric, Plan, Record, Result, Run


def run_of(*metrics: Metric, result: Result | None = None) -> Run:
    return Run(Record(result=result or Result(), plan=Plan(steps=9)), metrics, None, ())


def test_base_comes_from_the_record_or_from_step_0() -> None:
    logged = run_of(Metric(step=0, val_loss=2.0), Metric(step=5, val_loss=1.0))
    recorded = run_of(Metric(step=5, val_loss=1.0), result=Result(base_val_loss=2.0))
    assert curves_of(logged).base == curves_of(recorded).base == 2.0
    assert curves_of(logged).held_out == curves_of(recorded).held_out == Series((0, 5), (2.0, 1.0))


def test_outcome_of_an_unfinished_run_is_its_best_validation() -> None:
    run = run_of(
        Metric(step=0, val_loss=0.5),
        Metric(step=1, loss=3.0),
        Metric(step=2, val_loss=1.0),
        Metric(step=4, val_loss=1.5),
    )
    outcome = outcome_of(run, curves_of(run))
    assert (outcome.base, outcome.tuned, outcome.steps, outcome.planned) == (0.5, 1.0, 1, 9)


def test_speed_is_tokens_by_seconds() -> None:
    run = run_of(Metric(step=1, tokens=100, step_seconds=0.5), Metric(step=2, tokens=100, step_seconds=0))
    assert curves_of(run).speed == Series((1,), (200.0,))


def test_later_lines_replace_earlier_ones() -> None:
    curves = curves_of(
        run_of(*(Metric(step=step, loss=loss) for step, loss in ((1, 3.0), (2, 2.0), (2, 1.0), (1, 4.0))))
    )
    assert curves.loss == Series((1, 2), (4.0, 1.0))
    assert curves.repeated == 2


@pytest.mark.parametrize("count", [1, 7, 8, 100, 5000])
def test_smoothing_leaves_straight_lines(count: int) -> None:
    level = Series(tuple(range(count)), (2.5,) * count)
    assert smooth(level).values == pytest.approx([2.5] * min(count, POINTS))
    slope = Series(tuple(range(count)), tuple(float(step) for step in range(count)))
    smoothed = smooth(slope)
    middle = len(smoothed.steps) // 2
    assert smoothed.values[middle] == pytest.approx(smoothed.steps[middle], rel=1e-3)


def test_thin_curves_keep_mean_and_outline() -> None:
    values = tuple(float(step % 10) for step in range(6000))
    series = Series(tuple(range(6000)), values)
    assert len(thin(series).steps) == POINTS
    assert sum(thin(series).values) / POINTS == pytest.approx(4.5)
    assert {min(extremes(series).values), max(extremes(series).values)} == {0.0, 9.0}
    assert list(extremes(series).steps) == sorted(extremes(series).steps)
