"""A run's screen: a line for each topic, a bar with the loss and the time left, and validations as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from loratune.cli.output import stderr
from loratune.run.events import Begun, Event, Noticed, Said, StepDone, Validated

_LINES_WITHOUT_TERMINAL = 20


class Screen:
    """Listens to a run. On a terminal the bar moves; elsewhere about twenty lines say how it goes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        self.task: Any = None
        self.steps = 0
        self.base_loss: float | None = None
        self.val_loss: float | None = None
        self.tokens = 0
        self.seconds = 0.0
        self.peak = 0
        self.loss = float("nan")
        self.began = 0.0
        self.gone = False

    def __call__(self, event: Event | Said | Begun) -> None:
        """Show it; who reads the screen may go away, and the run goes on."""
        if self.gone:
            return
        try:
            self._show(event)
        except (OSError, SystemExit):  # rich leaves where a pipe is closed
            self.gone = True

    def _show(self, event: Event | Said | Begun) -> None:
        if isinstance(event, Said):
            self._finish()
            self._line(event.topic, event.text)
        elif isinstance(event, Begun):
            self._begin(event)
        elif isinstance(event, StepDone):
            self._step(event)
        elif isinstance(event, Validated):
            self._validated(event)
        elif isinstance(event, Noticed):
            self._line(event.kind, event.text)

    def close(self) -> None:
        if self.bar is not None and not self.gone:
            self.bar.stop()
        self.bar = None

    def _line(self, topic: str, text: str) -> None:
        # One check a line where there are several: they are what people read.
        for i, part in enumerate(text.replace("  ✓", "\n✓").replace("  ✗", "\n✗").split("\n")):
            self.console.print(f"[bold cyan]{escape(topic) if i == 0 else '':<7} [/]{_coloured(escape(part))}")

    def _begin(self, event: Begun) -> None:
        self.steps = event.steps
        self.began = time.perf_counter()
        if self.console.is_terminal:
            self.bar = Progress(
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
                expand=True,
            )
            self.bar.start()
            self.task = self.bar.add_task("", total=event.steps, completed=event.done)

    def _step(self, event: StepDone) -> None:
        self.tokens += event.tokens
        self.seconds += event.step_seconds
        self.peak = max(self.peak, event.peak_memory_bytes)
        self.loss = event.loss
        if self.bar is not None:
            self.bar.update(self.task, completed=event.step, description=self._figures())
        elif event.step == 1 or event.step % max(1, self.steps // _LINES_WITHOUT_TERMINAL) == 0:
            self._line(f"{event.step}/{self.steps}", self._figures())

    def _validated(self, event: Validated) -> None:
        if event.step == 0:
            self.base_loss = event.val_loss
            return
        self.val_loss = event.val_loss
        if self.bar is None:
            self._line(f"{event.step}/{self.steps}", f"val {event.val_loss:.3f} (base {_figure(self.base_loss)})")

    def _figures(self) -> str:
        val = "" if self.val_loss is None else f" · val {self.val_loss:.3f} (base {_figure(self.base_loss)})"
        speed = self.tokens / max(1e-9, self.seconds)
        return f"loss {self.loss:.3f}{val} · {speed:.0f} tok/s · peak {self.peak / 2**30:.1f} GB"

    def _finish(self) -> None:
        """The bar's last state, as a line that stays."""
        if self.steps == 0:
            return
        self.close()
        minutes, seconds = divmod(round(time.perf_counter() - self.began), 60)
        figures = self._figures() if self.seconds else "all of them were done before"
        self._line(f"{self.steps}", f"steps · {figures} · {minutes:02d}:{seconds:02d}")
        self.steps = 0


def _coloured(text: str) -> str:
    for mark, colour in (("✓", "green"), ("✗", "bold red")):
        if text.startswith(mark):
            return f"[{colour}]{mark}[/]{text[1:]}"
    return text


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


@contextmanager
def counting(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A bar over `total` rows on a terminal, about twenty lines elsewhere; yields what advances it."""
    console = stderr()
    if not console.is_terminal:
        yield _counted(console, total, what)
        return
    columns = (MofNCompleteColumn(), TextColumn(what), BarColumn(bar_width=None), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not total, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda rows: bar.update(task, advance=rows)


def _counted(console: Console, total: int, what: str) -> Callable[[int], None]:
    """Says how far it is whenever another twentieth is done."""
    done, step = 0, max(1, total // _LINES_WITHOUT_TERMINAL)

    def advance(rows: int) -> None:
        nonlocal done
        before, done = done, done + rows
        if done // step > before // step:
            console.print(f"{done}/{total} {what}")

    return advance
