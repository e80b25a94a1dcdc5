"""A tracker really gets what `metrics.jsonl` gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_tensorboard_holds_the_losses_of_the_metrics(quick: Callable[..., Any], tmp_path: Path) -> None:
    run = quick(tmp_path / "run", log_with="tensorboard", val=4, eval_every=3)
    (written,) = {path.parent for path in run.path.rglob("events.out.tfevents.*") if path.parent.name == "run"}
    events = EventAccumulator(str(written)).Reload()
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "val_loss"):
        logged = {event.step: event.value for event in events.Scalars(name)}
        expected = {line["step"]: line[name] for line in lines if name in line}
        assert logged.keys() == expected.keys()
        assert all(abs(logged[step] - expected[step]) < 1e-6 * abs(expected[step]) for step in expected)
