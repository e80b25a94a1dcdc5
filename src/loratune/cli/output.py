"""Printing: results to stdout, progress and messages to stderr."""

from __future__ import annotations

import codecs
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
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


# How standard output encodes what its encoding has no bytes for.
_REPLACED = "loratune.replaced"


def take_every_character() -> None:
    """Let standard output replace what it cannot encode; names of files that are not UTF-8 keep their bytes."""
    codecs.register_error(_REPLACED, _replaced)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors=_REPLACED)


def _replaced(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    codes = [ord(character) for character in error.object[error.start : error.end]]
    # As `surrogateescape` has it (PEP 383).
    return b"".join(bytes([code - 0xDC00]) if 0xDC80 <= code <= 0xDCFF else b"?" for code in codes), error.end


class OutputError(LoratuneError):
    """Standard output takes nothing more."""


@contextmanager
def _printing() -> Iterator[None]:
    """Turns what the system says against standard output, a full disk say, into an error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has gone; typer ends quietly then
        raise
    except OSError as error:
        raise output_refused(error) from None


def output_refused(error: OSError) -> OutputError:
    """The error for it; what is left in its buffer, which would fail once more as Python ends, goes nowhere."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return OutputError(f"standard output: {error.strerror or error}", hint="free some space, or send it elsewhere")


def write(text: str) -> None:
    """To standard output as it is, at once: readers of a pipe wait for it."""
    with _printing():
        sys.stdout.write(text)


def refuse_taken_file(out: str) -> None:
    """Raise, before anything takes time, where a file cannot be written without losing another."""
    path = Path(out).expanduser()
    if path.exists() or path.is_symlink():
        raise ConfigError(f"--out {out}: it is there already", hint="name a file that is not there yet")
    if not path.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {path.parent}", hint="make it first")


def write_json(value: Any, *, indent: int | None = 2) -> None:
    """Where the encoding of standard output lacks a character, as an escape of JSON."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent, default=str)
    write(text + "\n")


def emit(result: Any, *, as_json: bool, text: Iterable[Any] = ()) -> None:
    """The result as JSON, or the lines and tables of `text`."""
    if as_json:
        write_json(result)
        return
    console = stdout()
    with _printing():
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
    if as_json and not isinstance(error, OutputError):
        kind, problems, hint = type(error).__name__, list(error.problems), error.hint
        content = {"error": {"kind": kind, "problems": problems, "hint": hint, "exit_code": error.exit_code}}
        with suppress(OutputError):
            write_json(content)
            return error.exit_code
    with suppress(OSError):
        sys.stdout.flush()
    with suppress(OSError):
        stderr().print(f"[bold red]error[/] {escape(str(error))}")
    return error.exit_code
