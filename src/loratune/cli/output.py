"""Printing: results to stdout, progress and messages to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loratune.errors import ConfigError, LoratuneError, PeerError


def stdout() -> Console:
    return Console(highlight=False, soft_wrap=True)


def stderr() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


def write(text: str) -> None:
    """To standard output as it is, at once: readers of a pipe wait for it."""
    sys.stdout.write(text)
    sys.stdout.flush()


def refuse_taken_file(out: str) -> None:
    """Raise, before anything takes time, where a file cannot be written without losing another."""
    path = Path(out).expanduser()
    if path.exists() or path.is_symlink():
        raise ConfigError(f"--out {out}: it is there already", hint="name a file that is not there yet")
    if not path.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {path.parent}", hint="make it first")


def write_json(value: Any, *, indent: int | None = 2) -> None:
    write(json.dumps(value, indent=indent, ensure_ascii=False, default=str) + "\n")


def emit(result: Any, *, as_json: bool, text: Iterable[Any] = ()) -> None:
    """The result as JSON, or the lines and tables of `text`."""
    if as_json:
        write_json(result)
        return
    console = stdout()
    for item in text:
        console.print(escape(item) if isinstance(item, str) else item)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None) -> Table:
    """A plain table; the columns after the first are aligned to the right."""
    made = Table(title=title, box=None, pad_edge=False, header_style="bold", title_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*(escape(str(cell)) for cell in row))
    return made


def gigabytes(count: float) -> str:
    return f"{count / 2**30:.2f} GB" if count >= 2**30 else f"{count / 2**20:.1f} MB"


def complain(error: LoratuneError, *, as_json: bool) -> int:
    """Say what went wrong, unless another process has said it; returns the exit code."""
    if isinstance(error, PeerError) and error.said:
        return error.exit_code
    if as_json:
        kind, problems, hint = type(error).__name__, list(error.problems), error.hint
        content = {"error": {"kind": kind, "problems": problems, "hint": hint, "exit_code": error.exit_code}}
        write_json(content)
    else:
        sys.stdout.flush()
        stderr().print(f"[bold red]error[/] {escape(str(error))}")
    return error.exit_code
