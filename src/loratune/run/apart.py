"""A call in a process of its own: it starts with no memory taken and leaves none behind.

The child is told what to call by pickle on its standard input, and answers so on its standard output.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from loratune.errors import LoratuneError, RunInterrupted


def apart(function: Callable[[Any], Any], task: Any) -> Any:
    """What `function(task)` returns; a function of a module, which the child imports.

    Raises:
        LoratuneError: the one that it raised there; or that the process ended without an answer.
        RunInterrupted: Ctrl-C, once the child has ended too.
    """
    command = [sys.executable, "-c", f"from {__name__} import main; main()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603 - our own module
    try:
        answer, _ = child.communicate(pickle.dumps((function, task)))
    except KeyboardInterrupt:
        child.wait()  # it was interrupted too, and writes its checkpoint
        raise RunInterrupted("stopped", hint="the same command goes on with what is there") from None
    if child.returncode != 0 or not answer:
        how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
        raise LoratuneError(
            f"the process of its own that did this ended without an answer ({how})",
            hint="a kill by the system, for want of memory, looks like this",
        )
    found = pickle.loads(answer)  # noqa: S301 - from the process that was started here
    if isinstance(found, LoratuneError):
        raise found
    return found


def main() -> None:
    """In the child: whatever is printed on the way goes to standard error."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    function, task = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the process that started this one
    found: Any
    try:
        found = function(task)
    except LoratuneError as error:
        found = error
    answer.write(pickle.dumps(found))
    answer.close()
