"""Everything that a run writes down while it goes on: metrics, events, checks, and its state in the record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from loratune.report import write_report
from loratune.report.folder import METRICS
from loratune.run.events import Begun, Event, Noticed, RunListener, Said, StepDone, Validated
from loratune.run.folder import RunFolder
from loratune.run.record import CONDITIONS, changed_conditions, now
from loratune.training.checks import Check, require
from loratune.training.events import Listener

# The kind of event that tells of another machine, other versions or another number of processes.
CHANGED = "conditions"


class Journal:
    """Hears the loop's events, keeps `record` and the folder's files up to date, and passes everything on."""

    def __init__(self, folder: RunFolder, record: dict[str, Any], listeners: Sequence[RunListener]) -> None:
        self.folder = folder
        self.record = record
        self.listeners = tuple(listeners)
        self.trackers: list[Listener] = []
        self._conditions = {key: record[key] for key in CONDITIONS}
        self._peak = 0
        self._tokens = 0
        self._seconds = 0.0

    def open(self, before: dict[str, Any] | None) -> None:
        """Write the record of a run that starts, or goes on from `before`."""
        if before is not None:
            # Its conditions too: they hold for all that is done so far, until a step is done under other ones.
            self.record.update({key: before[key] for key in ("created", "events", "result", *CONDITIONS)})
        self.folder.write_record(self.record)

    def go_on_after(self, step: int) -> None:
        """Forget what came after this step; what came before is in the metrics, also where a kill left no record.

        Where this process works under other conditions than the ones before did, an event says so.
        """
        self.record["events"] = list(_until(step, self.record["events"]))
        self.record["result"] = {}
        kept = self.folder.keep_metrics(step)
        for event in kept:
            self._note_result(event)
        logged = len({event.step for event in kept if isinstance(event, StepDone)})
        changed = changed_conditions(self.record, self._conditions)
        self.record.update(self._conditions)
        if changed:
            what = ", ".join(f"{name} {before} before, {after} now" for name, before, after in changed)
            self.hear(Noticed(step, CHANGED, f"{what}: equal within rounding, not in bits"))
        if logged < step:
            text = f"{METRICS} has {logged} of the {step} steps that were done before: the others are in no curve"
            self.hear(Noticed(step, "metrics", text))

    def say(self, topic: str, text: str) -> None:
        self._pass_on(Said(topic, text))

    def begin(self, done: int, steps: int) -> None:
        self._pass_on(Begun(done, steps))
        base = self.record["result"].get("base_val_loss")
        if done and base is not None:  # heard by the process before
            self._pass_on(Validated(0, base))

    def hear(self, event: Event) -> None:
        if isinstance(event, Noticed):
            self.record["events"].append(asdict(event))
            self.folder.write_record(self.record)
        else:
            self.folder.add_metrics(asdict(event))
            self._note_result(event)
        for tracker in self.trackers:
            tracker(event)
        self._pass_on(event)

    def base_loss(self, loss: float) -> None:
        """The held-out loss of the base, which is validation 0."""
        self.hear(Validated(0, loss))

    def take(self, topic: str, found: Sequence[Check]) -> None:
        """Note checks and say them; raises `CheckError` if one failed."""
        self.record["checks"] += [asdict(check) for check in found]
        self.say(topic, "  ".join(f"{'✓' if c.passed else '✗'} {c.name} ({c.detail})" for c in found))
        require(found)

    def measured(self) -> dict[str, Any]:
        """Totals of the steps heard, by the processes before too."""
        return {
            "seconds": round(self._seconds, 2),
            "peak_memory_bytes": self._peak,
            "tokens_per_second": round(self._tokens / max(1e-9, self._seconds), 1),
        }

    def close(self, state: str, error: str | None = None) -> None:
        """Write the report and the record's last state, which is last: it says that the run is finished."""
        self.record.update(state=state, ended=now(), measured=self.measured())
        if error is not None:
            self.record["error"] = error
        if self.folder.written_here:
            write_report(self.folder.path, self.record)
        self.folder.write_record(self.record)

    def _note_result(self, event: StepDone | Validated) -> None:
        result = self.record["result"]
        if isinstance(event, StepDone):
            self._peak = max(self._peak, event.peak_memory_bytes)
            self._tokens += event.tokens
            self._seconds += event.step_seconds
            result.update(steps=event.step, train_loss=event.loss)
        else:
            result["val_loss" if event.step else "base_val_loss"] = event.val_loss

    def _pass_on(self, event: Event | Said | Begun) -> None:
        for listener in self.listeners:
            listener(event)


def _until(step: int, events: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Events up to this step. Where conditions changed later, they change here now: what is kept was done before."""
    for event in events:
        if event["step"] <= step:
            yield event
        elif event.get("kind") == CHANGED:
            yield {**event, "step": step}
