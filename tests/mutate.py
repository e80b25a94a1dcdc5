"""Tries the changes that mutmut made: a pytest plugin, `make mutants`.

mutmut writes every change of a function beside it, and a switch that picks one by its name. Its own runner starts a
pytest for each; here the tests are collected once, and each change is a fork that runs what reaches it, the quickest
first, until something fails. Exit codes go where mutmut keeps them: 0 survived, 1 noticed, 33 reached by no test, 36
too slow.

Time is the processor's, not the clock's: how busy the machine is must not decide what counts as noticed. As a control
some forks change nothing, and `control.json` says how many of those were called noticed.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
from _pytest.runner import runtestprotocol

_SURVIVED, _NOTICED, _UNREACHED, _TOO_SLOW = 0, 1, 33, 36
# Seconds that the tests of one change take together at most, and what they are given beyond what they take without it.
_BUDGET, _LEAST, _TIMES = 8.0, 8.0, 4.0
# How many times as long by the clock: what waits for ever takes no time of the processor.
_PATIENCE = 60.0
_JOBS = int(os.environ.get("JOBS", os.cpu_count() or 1))
_CONTROLS = 100
# The share of tests that may fail with switches in the code.
_LEFT_OUT = 0.01
_CONTROL = "control__mutmut_"


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
    reach, costs = _merged(_in_forks([partial(_reach, session, items) for items in _by_file(session.items)]))
    todo = list(_untried(folder))
    random.Random(0).shuffle(todo)
    print(f"\n{len(session.items)} tests reach {len(reach)} functions, {len(todo)} changes to try", flush=True)
    controls = {f"{_CONTROL}{number}": name for number, name in enumerate(todo[:: max(1, len(todo) // _CONTROLS)])}
    todo = [*todo, *controls]
    random.Random(1).shuffle(todo)
    items = {item.nodeid: item for item in session.items}
    running: dict[int, tuple[str, float]] = {}
    codes: dict[str, int] = {}
    while todo or running:
        while todo and len(running) < _JOBS:
            name = todo.pop()
            chosen = _quickest(reach.get(_function(controls.get(name, name)), ()), costs)
            if not chosen:
                codes[name] = _UNREACHED
                continue
            limit = _LEAST + _TIMES * _seconds(chosen, costs)
            pid = _fork(name, [items[test] for test in chosen], limit)
            running[pid] = (name, time.monotonic() + _PATIENCE * limit)
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
            late |= code == -signal.SIGXCPU
            # A change that ends the process was noticed too.
            codes[name] = _TOO_SLOW if late else _SURVIVED if code == 0 else _NOTICED


def _fork(name: str, items: Sequence[pytest.Item], limit: float) -> int:
    """A process that tries a change, or none where it is a control, for so many seconds of the processor."""
    pid = os.fork()
    if not pid:
        _silence()
        from mutmut.mutation.trampoline import set_mutant_under_test

        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), resource.RLIM_INFINITY))
        set_mutant_under_test("" if name.startswith(_CONTROL) else name)
        _end(_NOTICED if any(_failures(item, then) for item, then in _pairs(items)) else _SURVIVED)
    return pid


# A test's own seconds, and those of each fixture that it shares with others, by where the fixture is and its name.
_Cost = tuple[float, dict[str, float]]


def _by_file(items: Sequence[pytest.Item]) -> list[list[pytest.Item]]:
    """Parts of the tests, one for each job; those of a file stay together, with what they share."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    parts: list[list[pytest.Item]] = [[] for _ in range(_JOBS)]
    for own in sorted(files.values(), key=len, reverse=True):
        min(parts, key=len).extend(own)
    return [part for part in parts if part]


def _merged(parts: Sequence[Any]) -> tuple[dict[str, list[str]], dict[str, _Cost]]:
    """The tests that call each function, and how long each test takes."""
    reach: dict[str, list[str]] = {}
    costs: dict[str, _Cost] = {}
    left_out: list[str] = []
    for own_reach, own_costs, own_left_out in parts:
        for function, tests in own_reach.items():
            reach.setdefault(function, []).extend(tests)
        costs.update(own_costs)
        left_out += own_left_out
    print(*left_out, sep="\n", flush=True)
    if len(left_out) > (len(costs) + len(left_out)) * _LEFT_OUT:
        raise RuntimeError(f"{len(left_out)} tests fail without a change")
    return reach, costs


def _reach(
    session: pytest.Session, items: Sequence[pytest.Item]
) -> tuple[dict[str, list[str]], dict[str, _Cost], list[str]]:
    """The tests that call each function, how long each test takes, and those that fail."""
    from mutmut.mutation.trampoline import set_mutant_under_test
    from mutmut.state import state

    set_mutant_under_test("stats")
    shared = _Shared()
    session.config.pluginmanager.register(shared)
    reach: dict[str, list[str]] = {}
    costs: dict[str, _Cost] = {}
    left_out: list[str] = []
    for item, then in _pairs(items):
        state()._stats.clear()
        begun, made = _used(), shared.total
        failures = _failures(item, then)
        if failures:  # it does not bear the switches themselves: a compiler does not trace them
            left_out.append("\n".join([f"{item.nodeid} fails without a change", *failures[-1].splitlines()[-3:]]))
            continue
        own = _used() - begun - (shared.total - made)
        costs[item.nodeid] = (own, shared.of(item))
        for function in state()._stats:
            reach.setdefault(function, []).append(item.nodeid)
    return reach, costs, left_out


class _Shared:
    """Seconds of fixtures that live longer than a test: the first one pays for them, a fork of others would too."""

    def __init__(self) -> None:
        self.total = 0.0
        self._seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        begun = _used()
        try:
            return (yield)  # type: ignore[return-value]
        finally:
            if fixturedef.scope != "function":
                seconds = _used() - begun
                self.total += seconds
                self._seconds[self._name(fixturedef)] = seconds

    def of(self, item: Any) -> dict[str, float]:
        found = {self._name(one) for every in item._fixtureinfo.name2fixturedefs.values() for one in every}
        return {name: self._seconds[name] for name in found & self._seconds.keys()}

    @staticmethod
    def _name(fixturedef: Any) -> str:
        return f"{fixturedef.baseid}::{fixturedef.argname}"


def _in_forks(makes: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each gives, from a process of its own: after a backward pass torch does not let itself be forked."""
    found = []
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place, str(number)) for number in range(len(makes))]
        pids = [_made_in_fork(make, file) for make, file in zip(makes, files, strict=True)]
        failed = [bool(os.waitpid(pid, 0)[1]) for pid in pids]
        for file, failure in zip(files, failed, strict=True):
            text = file.read_text(encoding="utf-8")
            if failure:
                raise RuntimeError(text)
            found.append(json.loads(text))
    return found


def _made_in_fork(make: Callable[[], Any], file: Path) -> int:
    pid = os.fork()
    if not pid:
        try:
            file.write_text(json.dumps(make()), encoding="utf-8")
        except BaseException as error:  # noqa: BLE001 - it is passed on
            file.write_text(str(error), encoding="utf-8")
            _end(1)
        _end(0)
    return pid


def _failures(item: pytest.Item, then: Any) -> list[str]:
    item._initrequest()  # type: ignore[attr-defined]
    return [report.longreprtext for report in runtestprotocol(item, log=False, nextitem=then) if report.failed]


def _pairs(items: Sequence[pytest.Item]) -> Iterator[tuple[pytest.Item, Any]]:
    """Each item and the one after it, which tells pytest what to leave set up."""
    yield from zip(items, [*items[1:], _Beside(items[0].session)], strict=True)


def _quickest(tests: Sequence[str], costs: dict[str, _Cost]) -> list[str]:
    chosen: list[str] = []
    made: set[str] = set()
    left = _BUDGET
    for test in sorted(tests, key=lambda test: _seconds([test], costs)):
        own, shared = costs[test]
        more = own + sum(seconds for name, seconds in shared.items() if name not in made)
        if more <= left:
            chosen.append(test)
            made |= shared.keys()
            left -= more
    return chosen


def _seconds(tests: Sequence[str], costs: dict[str, _Cost]) -> float:
    """What these take in one process: a fixture that several share is made once."""
    shared = {name: seconds for test in tests for name, seconds in costs[test][1].items()}
    return sum(costs[test][0] for test in tests) + sum(shared.values())


def _function(mutant: str) -> str:
    return re.sub(r"__mutmut_\d+$", "", mutant)


def _untried(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py.meta")):
        for name, code in json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"].items():
            if code is None:
                yield name


def _keep(folder: Path, codes: dict[str, int]) -> None:
    _keep_controls(folder / "control.json", [code for name, code in codes.items() if name.startswith(_CONTROL)])
    for path in sorted(folder.rglob("*.py.meta")):
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content["exit_code_by_key"]
        if known.keys() & codes.keys():
            known.update({name: code for name, code in codes.items() if name in known})
            path.write_text(json.dumps(content, indent=4), encoding="utf-8")


def _keep_controls(path: Path, codes: Sequence[int]) -> None:
    """How many forks without a change there were in all, and how many of them were called noticed."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"tried": 0, "noticed": 0}
    known["tried"] += len(codes)
    known["noticed"] += sum(code in (_NOTICED, _TOO_SLOW) for code in codes)
    path.write_text(json.dumps(known), encoding="utf-8")


def _used() -> float:
    """Seconds of the processor that this process and those that it waited for have used."""
    return sum(os.times()[:4])


def _silence() -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)


def _end(code: int) -> NoReturn:
    os._exit(code)
