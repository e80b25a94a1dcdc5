"""Handlers of signals are lent for a block, and what others set meanwhile is theirs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from loratune.run.signals import stop_signals, terminated_like_interrupted


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_given_back() -> None:
    with terminated_like_interrupted():
        with stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_set()
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_terminated_outside_the_loop() -> None:
    with pytest.raises(KeyboardInterrupt), terminated_like_interrupted():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_programs_own_way() -> None:
    heard: list[int] = []

    def own(number: int, _frame: object) -> None:
        heard.append(number)

    signal.signal(signal.SIGTERM, own)
    with terminated_like_interrupted():
        os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is own


def test_ignored_from_within() -> None:
    """As a process of a failed group does, which the launcher would end before it has said why (exit code -15)."""
    with terminated_like_interrupted(), stop_signals():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    os.kill(os.getpid(), signal.SIGTERM)
