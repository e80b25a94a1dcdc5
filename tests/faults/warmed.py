"""A process that has imported everything, and forks a child for each thing to do: killing one costs no start.

    python -m tests.faults.warmed     reads one request a line from stdin, answers each with one line on stdout

`Warmed` is its client. What a child does is in `tests/faults/acts.py`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: its exit code; minus the signal's number where one ended it.
        said: what it reported last, None where it came to nothing.
        printed: all that it wrote to stdout and stderr. seconds: how long it lived.
    """

    code: int
    said: Any
    printed: str
    seconds: float

    @property
    def is_typed(self) -> bool:
        """Whether it ended in a result or in an error that somebody thought of."""
        return self.code >= 0 and "Traceback" not in self.printed and "internal error" not in self.printed


class Warmed:
    """The client: `warmed("train", …)` runs an act of `tests.faults.acts` in a child of the warmed process."""

    def __init__(self, folder: Path) -> None:
        self._printed = folder / "printed.txt"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.warmed", str(self._printed)],
            cwd=ROOT,
            # One thread: a child of a process with threads may wait for ever for one that it does not have.
            env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, act: str, /, *, signal_after: tuple[float, int] | None = None, **given: Any) -> Ended:
        """Do it and wait for its end; `signal_after` sends the child a signal after so many seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"act": act, "given": given, "signal_after": signal_after}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        printed = self._printed.read_text(encoding="utf-8", errors="replace")
        return Ended(answer["code"], answer["said"], printed, answer["seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def _in_child(request: dict[str, Any], printed: str) -> dict[str, Any]:
    from tests.faults import acts

    reader, writer = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with open(printed, "wb") as file:  # noqa: PTH123 - a file handle for dup2
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        # As in a process of its own; the client's are those of pytest.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = 1
        try:
            code = getattr(acts, request["act"])(acts.Teller(writer), **request["given"])
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    if request["signal_after"] is not None:
        seconds, number = request["signal_after"]
        time.sleep(seconds)
        os.kill(child, number)  # a child that has ended is still there to be waited for
    with open(reader, encoding="utf-8") as pipe:  # noqa: PTH123 - a file handle
        lines = pipe.read().splitlines()
    _, status = os.waitpid(child, 0)
    said = json.loads(lines[-1]) if lines else None
    return {"code": os.waitstatus_to_exitcode(status), "said": said, "seconds": time.monotonic() - started}


def main(printed: str) -> None:
    from tests.faults import acts

    acts.warm()
    for line in sys.stdin:
        print(json.dumps(_in_child(json.loads(line), printed)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
