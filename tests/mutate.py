"""Tries the changes that mutmut made: a pytest plugin, `make mutants`.

mutmut writes every change of a function beside it, and a switch that picks one by its name. Its own runner starts a
pytest for each; here the tests are collected once, and each change is a fork that runs what reaches it, the quickest
first, until something fails. Exit codes go where mutmut keeps them: 0 survived, 1 noticed, 33 reached by no test, 36
too slow.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from _pytest.runner import runtestprotocol

_SURVIVED, _NOTICED, _UNREACHED, _TOO_SLOW = 0, 1, 33, 36
# Seconds that the tests of one change take together at most, and what they are given beyond what they take without it.
_BUDGET, _LEAST, _TIMES = 8.0, 8.0, 4.0
_JOBS = os.cpu_count() or 1


class _Beside:
    """Stands for an item of another file, so that nothing of a file is left set up."""

    def __init__(self, session: pytest.Session) -> None:
        self.session = session

    def listchain(self) -> list[pytest.Session]:
        return [self.session]


def write() -> None:
    """A copy of the tree in `mutants/`, with every change in it; where it is there, it is gone on with."""
    done = Path("mutants", "written")
    if done.exists():
        return
    shutil.rmtree("mutants", ignore_errors=True)
    from mutmut.__main__ import create_mutants
    from mutmut.utils.file_utils import copy_also_copy_files, copy_src_dir

    Path("mutants").mkdir()
    copy_src_dir()
    copy_also_copy_files()
    create_mutants(_JOBS)
    done.touch()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool:
    if session.testsfailed or session.config.option.collectonly:
        return False
    folder = Path(session.config.rootpath)
    reach, seconds = _in_fork(lambda: _reach(session))
    todo = list(_untried(folder))
    random.Random(0).shuffle(todo)
    print(f"\n{len(session.items)} tests reach {len(reach)} functions, {len(todo)} changes to try", flush=True)
    items = {item.nodeid: item for item in session.items}
    running: dict[int, tuple[str, float]] = {}
    codes: dict[str, int] = {}
    while todo or running:
        while todo and len(running) < _JOBS:
            name = todo.pop()
            chosen = _quickest(reach.get(_function(name), ()), seconds)
            if not chosen:
                codes[name] = _UNREACHED
                continue
            limit = _LEAST + _TIMES * sum(seconds[test] for test in chosen)
            running[_fork(name, [items[test] for test in chosen])] = (name, time.monotonic() + limit)
        _gather(running, codes)
        if len(codes) >= 50 or not running:
            _keep(folder, codes)
            print(f"{len(todo)} left", flush=True)
            codes.clear()
    _keep(folder, codes)
    return True


def _gather(running: dict[int, tuple[str, float]], codes: dict[str, int]) -> None:
    """Wait for a fork to end, or end one that takes too long."""
    time.sleep(0.005)
    for pid, (name, limit) in list(running.items()):
        late = time.monotonic() > limit
        if late:
            os.kill(pid, signal.SIGKILL)
        ended, status = os.waitpid(pid, 0 if late else os.WNOHANG)
        if ended:
            del running[pid]
            code = os.waitstatus_to_exitcode(status)
            # A change that ends the process was noticed too.
            codes[name] = _TOO_SLOW if late else _SURVIVED if code == 0 else _NOTICED


def _fork(name: str, items: Sequence[pytest.Item]) -> int:
    pid = os.fork()
    if not pid:
        _silence()
        from mutmut.mutation.trampoline import set_mutant_under_test

        set_mutant_under_test(name)
        _end(_NOTICED if any(_failures(item, then) for item, then in _pairs(items)) else _SURVIVED)
    return pid


def _reach(session: pytest.Session) -> tuple[dict[str, list[str]], dict[str, float]]:
    """The tests that call each function, and how long each test takes."""
    from mutmut.mutation.trampoline import set_mutant_under_test
    from mutmut.state import state

    set_mutant_under_test("stats")
    reach: dict[str, list[str]] = {}
    seconds: dict[str, float] = {}
    for item, then in _pairs(session.items):
        state()._stats.clear()
        begun = time.monotonic()
        failures = _failures(item, then)
        if failures:
            raise RuntimeError("\n".join([f"{item.nodeid} fails without a change", *failures]))
        seconds[item.nodeid] = time.monotonic() - begun
        for function in state()._stats:
            reach.setdefault(function, []).append(item.nodeid)
    return reach, seconds


def _in_fork(make: Callable[[], Any]) -> Any:
    """What `make` gives, from a process of its own: after a backward pass torch does not let itself be forked."""
    with tempfile.NamedTemporaryFile("r+") as file:
        pid = os.fork()
        if not pid:
            try:
                Path(file.name).write_text(json.dumps(make()), encoding="utf-8")
            except BaseException as error:  # noqa: BLE001 - it is passed on
                Path(file.name).write_text(str(error), encoding="utf-8")
                _end(1)
            _end(0)
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError(file.read())
        return json.load(file)


def _failures(item: pytest.Item, then: Any) -> list[str]:
    item._initrequest()  # type: ignore[attr-defined]
    return [report.longreprtext for report in runtestprotocol(item, log=False, nextitem=then) if report.failed]


def _pairs(items: Sequence[pytest.Item]) -> Iterator[tuple[pytest.Item, Any]]:
    """Each item and the one after it, which tells pytest what to leave set up."""
    yield from zip(items, [*items[1:], _Beside(items[0].session)], strict=True)


def _quickest(tests: Sequence[str], seconds: dict[str, float]) -> list[str]:
    chosen: list[str] = []
    left = _BUDGET
    for test in sorted(tests, key=seconds.__getitem__):
        left -= seconds[test]
        if left >= 0:
            chosen.append(test)
    return chosen


def _function(mutant: str) -> str:
    return re.sub(r"__mutmut_\d+$", "", mutant)


def _untried(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py.meta")):
        for name, code in json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"].items():
            if code is None:
                yield name


def _keep(folder: Path, codes: dict[str, int]) -> None:
    for path in sorted(folder.rglob("*.py.meta")):
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content["exit_code_by_key"]
        if known.keys() & codes.keys():
            known.update({name: code for name, code in codes.items() if name in known})
            path.write_text(json.dumps(content, indent=4), encoding="utf-8")


def _silence() -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)


def _end(code: int) -> NoReturn:
    os._exit(code)
