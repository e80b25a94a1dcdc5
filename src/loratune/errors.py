"""Every failure a user can meet, as one tree.

    LoratuneError              exit code 1
    ├── ConfigError            2   a setting, option or target is wrong
    │   ├── TargetError            the plan found names that the model does not have
    │   └── MissingExtraError      an optional dependency is not installed
    ├── DataError              3   a row, file or template cannot be trained on
    ├── CheckError             4   a self-check found that something is not what it must be
    ├── OutOfMemoryError       5
    ├── DivergedError          6   the loss or the weights became non-finite, or the model only guesses
    ├── RegressionError        7   a comparison was lost
    ├── RunInterrupted         130 stopped on request, a checkpoint is saved
    ├── ModelError             1   a base model cannot be loaded or is not usable
    ├── AdapterFileError       1   an adapter folder is incomplete, foreign or damaged
    ├── AdapterStateError      1   a verb of the handle that its present state does not allow
    │   └── MergedError            … because an adapter is folded into the weights
    ├── RunFolderError         1   a run folder holds something else than expected
    └── PeerError              that of the first process that failed, of several that train together

An error carries every problem found, not the first, and one hint: the nearest fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

T = TypeVar("T")

_SHOWN_PROBLEMS = 20


class LoratuneError(Exception):
    """Base of all errors raised on purpose.

    Args:
        problems: one sentence, or one for each problem found.
        hint: what to do about it, as an imperative sentence without a full stop.
    """

    exit_code = 1

    def __init__(self, problems: str | Iterable[str], *, hint: str = "") -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        self.hint = hint
        super().__init__(self.problems, hint)

    def __str__(self) -> str:
        shown = list(self.problems[:_SHOWN_PROBLEMS])
        hidden = len(self.problems) - len(shown)
        if hidden:
            shown.append(f"… and {hidden} more")
        text = shown[0] if len(shown) == 1 else "\n".join(f"- {line}" for line in shown)
        return f"{text}\nhint: {self.hint}" if self.hint else text

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.problems, self.hint)


def _rebuild(kind: type[LoratuneError], problems: tuple[str, ...], hint: str) -> LoratuneError:
    return kind(problems, hint=hint)


class ConfigError(LoratuneError):
    exit_code = 2


class TargetError(ConfigError):
    pass


class MissingExtraError(ConfigError):
    def __init__(self, problems: str | Iterable[str], *, extra: str = "", hint: str = "") -> None:
        super().__init__(problems, hint=hint or f"pip install 'loratune[{extra}]'")


class DataError(LoratuneError):
    exit_code = 3


class CheckError(LoratuneError):
    exit_code = 4


class OutOfMemoryError(LoratuneError):
    exit_code = 5


class DivergedError(LoratuneError):
    exit_code = 6


class RegressionError(LoratuneError):
    exit_code = 7


class RunInterrupted(LoratuneError):
    exit_code = 130


class ModelError(LoratuneError):
    pass


class AdapterFileError(LoratuneError):
    pass


class AdapterStateError(LoratuneError):
    pass


class MergedError(AdapterStateError):
    pass


class RunFolderError(LoratuneError):
    pass


class PeerError(LoratuneError):
    """Another process of the same run has failed.

    Args:
        exit_code: that process's.
        said: whether it has said so itself, so that nobody else need.
    """

    def __init__(self, problems: str | Iterable[str], *, hint: str = "", exit_code: int = 1, said: bool = True) -> None:
        super().__init__(problems, hint=hint)
        self.exit_code = exit_code
        self.said = said

    def __reduce__(self) -> tuple[object, ...]:
        return partial(PeerError, hint=self.hint, exit_code=self.exit_code, said=self.said), (self.problems,)


class Refusals:
    """Several things that may each be refused, and one error for all that were, of the first one's kind."""

    def __init__(self) -> None:
        self.errors: list[LoratuneError] = []

    def attempt(self, act: Callable[[], T]) -> T | None:
        """What `act` returns; None where it was refused."""
        try:
            return act()
        except LoratuneError as error:
            self.errors.append(error)
            return None

    def check(self) -> None:
        """Raise if anything was refused."""
        if self.errors:
            hints = dict.fromkeys(error.hint for error in self.errors if error.hint)
            problems = [problem for error in self.errors for problem in error.problems]
            raise type(self.errors[0])(problems, hint="; ".join(hints))


def nearest(name: str, valid: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the closest of `valid`, or an empty string."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
