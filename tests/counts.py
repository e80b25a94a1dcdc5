"""What the tests counted while they ran, and the page that says it: `docs/reliability.md`, written by `make test-full`.

A test that counts takes the fixture `counted` and calls `counted("moment of a kill")` once for each thing that it has
seen hold; what a failed test counted does not count. A new kind of thing needs its line in `ROWS`, and nothing else.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

# What is counted, in the order of the page → what it means that it was counted.
ROWS = {
    "moment of a kill": "SIGKILL, then the same command again: the files of an uninterrupted run, bit for bit",
    "moment of a second kill": "the command that went on was killed too, and the third one gave the same bits",
    "look at what a kill left": "`show`, `report` and `eval` gave a result or a typed error, never a traceback",
    "moment of SIGINT or SIGTERM": "exit 130 or a finished run; the same command then gave the same bits",
    "moment of a full disk": "exit 1 and an error that says so; with space again, the same bits",
    "size of a full disk": "a real file system of that size ran full, or a real limit on files; then the same bits",
    "place that may not be written": "a folder or file system that refuses: exit 1, an error that says so, same bits",
    "file that vanished": "data or base gone: a typed error, the run folder as it was; back again, the same bits",
    "damage to a checkpoint": "it is said, the one before is taken, the same bits",
    "memory that ran out": "a real limit: the micro-batch halves, the record says so, the result agrees",
    "divergence": "exit 6, the last good checkpoint stays and is sound",
    "fault that a self-check must catch": "planted in a run: it ends with this check's name, exit 4",
    "fault that a refusal must catch": "planted in files, data or tokenizer: a typed error that names it",
    "malformed input": "rows, files, settings, adapters, model folders: read right, or a typed error that names it",
}

PROPERTY = "counted"


def named(what: str) -> str:
    """The same, if there is such a row."""
    if what not in ROWS:
        close = difflib.get_close_matches(what, ROWS, n=1)
        raise KeyError(f"{what!r} is no row of tests/counts.py{f', {close[0]!r} is' if close else ''}")
    return what


def totals(properties: Iterable[tuple[str, Any]]) -> Counter[str]:
    """Sums of what tests counted, from the properties in their reports."""
    found: Counter[str] = Counter()
    for name, value in properties:
        if name == PROPERTY:
            what, number = value
            found[what] += number
    return found


def with_counts(page: str, counts: Mapping[str, int], head: str) -> str:
    """The page with these counts, and `head` above them, between its two marks."""
    lines = [f"| {what} | {counts.get(what, 0)} | {meaning} |" for what, meaning in ROWS.items()]
    table = "\n".join([head, "", "| what | count | held each time |", "|---|---:|---|", *lines])
    return between(page, "counts", table)


def between(page: str, name: str, text: str) -> str:
    """The page with `text` between the two marks of this name."""
    marks = re.compile(rf"(<!-- {name}: [^>]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    if not marks.search(page):
        raise ValueError(f"the page lacks the marks of {name}")
    return marks.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page)
