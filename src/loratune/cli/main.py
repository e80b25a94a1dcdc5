"""The door: runs a command, and turns errors into messages and exit codes."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence

from loratune.cli.commands import app
from loratune.cli.output import complain, output_refused, stderr, take_every_character, write_json
from loratune.errors import ConfigError, LoratuneError, OutOfMemoryError, RunInterrupted

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    # tokenizers warns about forks that data loaders make; nothing here forks after tokenising.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    take_every_character()
    try:
        app(args=arguments, prog_name="loratune")
    except SystemExit as leave:
        return _left(leave.code if isinstance(leave.code, int) else 0, as_json=as_json)
    except LoratuneError as error:
        return complain(error, as_json=as_json)
    except Exception as error:  # noqa: BLE001 - the last door: no traceback passes it
        return complain(_known(error) or _internal(error), as_json=as_json)
    return 0


def _known(error: Exception) -> LoratuneError | None:
    return _out_of_memory(error) or _refused(error) or _not_utf8(error)


def _out_of_memory(error: Exception) -> LoratuneError | None:
    """Memory that ran out, as torch says it; looking must not import torch."""
    if "torch" in sys.modules:
        from loratune.training.memory import is_out_of_memory

        if not is_out_of_memory(error):
            return None
    elif not isinstance(error, MemoryError):
        return None
    return OutOfMemoryError("out of memory", hint="lower --batch-size or --max-length")


def _refused(error: Exception) -> LoratuneError | None:
    """What the system refused: a full disk, a folder that is somebody else's."""
    if not isinstance(error, OSError) or error.strerror is None:
        return None
    if error.filename is None:  # help, which typer prints
        return output_refused(error) if error.errno in _FULL else None
    return LoratuneError(f"{error.filename}: {error.strerror}", hint="free some space or use another folder")


def _not_utf8(error: Exception) -> LoratuneError | None:
    """A name that is not UTF-8, given to a library that takes no other ones."""
    if not isinstance(error, UnicodeEncodeError) or not 0xDC80 <= ord(error.object[error.start]) <= 0xDCFF:
        return None
    return LoratuneError(f"{error.object[:200]!r} is not UTF-8", hint="rename the file or folder, or use another one")


def _left(code: int, *, as_json: bool) -> int:
    """typer said what was wrong with the command line on stderr; a program that reads stdout is told too."""
    if code == ConfigError.exit_code and as_json:
        hint = "see --help"
        write_json({"error": {"kind": "UsageError", "problems": ["wrong usage"], "hint": hint, "exit_code": code}})
    elif code == RunInterrupted.exit_code:
        stderr().print("interrupted")
    return code


def _internal(error: Exception) -> LoratuneError:
    """What nobody foresaw: said in one line, with the traceback for those who want to report it."""
    if os.environ.get("LORATUNE_TRACEBACK"):
        traceback.print_exception(error)
    hint = "this is a bug in loratune: please report it with the output of LORATUNE_TRACEBACK=1"
    return LoratuneError(f"internal error: {type(error).__name__}: {error}", hint=hint)
