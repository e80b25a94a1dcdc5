"""What all adapted modules of one model look up: which adapters count now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakSet

from loratune.errors import AdapterStateError
from loratune.lora.dropout import TokenCounter
from loratune.lora.rows import Rows, TokenRows


class View(NamedTuple):
    """One state of a model's adapters.

    Attributes:
        active: names of the adapters whose updates add up.
        rows: an adapter for each row of the batch, or for each token, instead.
        counter: where dropout masks are drawn from; torch's generator without one.
        batch: how many rows the model must be given, where somebody said one adapter for each.
    """

    active: tuple[str, ...] = ()
    rows: Rows | TokenRows | None = None
    counter: TokenCounter | None = None
    batch: int | None = None


class _Bound:
    """A view that a bound function will see again, under the names that adapters have by then."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.missing = ""


class AdapterState:
    """Holds the present view. Switching adapters replaces it: a pointer change, never a walk."""

    def __init__(self, active: tuple[str, ...] = ()) -> None:
        self.view = View(active)
        # What holds again when the blocks that are open now end, with the adapters that each block uses.
        self._suspended: list[tuple[View, tuple[str, ...]]] = []
        self._bound: WeakSet[_Bound] = WeakSet()

    @property
    def active(self) -> tuple[str, ...]:
        return self.view.active

    @property
    def suspended(self) -> bool:
        """Whether something else will hold again when a block ends."""
        return bool(self._suspended)

    @property
    def used(self) -> frozenset[str]:
        """Adapters that are active now, or will be again when a block ends."""
        return frozenset(self.active).union(*(view.active + used for view, used in self._suspended))

    def change(self, **fields: Any) -> None:
        self.view = self.view._replace(**fields)

    def rename(self, old: str, new: str) -> None:
        def renamed(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(new if name == old else name for name in names)

        def again(view: View) -> View:
            return view._replace(active=renamed(view.active))

        self.view = again(self.view)
        self._suspended = [(again(view), renamed(used)) for view, used in self._suspended]
        for bound in self._bound:
            bound.view = again(bound.view)

    def forget(self, name: str) -> None:
        """The adapter is gone: what was computed with it can be computed no more."""
        for bound in self._bound:
            if name in bound.view.active:
                bound.missing = name

    def clear(self) -> None:
        """No adapter, now or when a block ends."""
        self.view, self._suspended = View(), []

    @contextmanager
    def suspending(self, used: tuple[str, ...] = (), **fields: Any) -> Iterator[None]:
        """The view changed inside the block, with adapters that it uses; after it what was active is so again."""
        self._suspended.append((self.view, used))
        self.change(**fields)
        try:
            yield
        finally:
            if self._suspended:  # not so after `clear`
                before, _ = self._suspended.pop()
                self.change(active=before.active, rows=before.rows, batch=before.batch)

    @contextmanager
    def counting(self, counter: TokenCounter) -> Iterator[None]:
        """Inside the block dropout masks are drawn from `counter`."""
        before = self.view.counter
        self.change(counter=counter)
        try:
            yield
        finally:
            self.change(counter=before)

    @contextmanager
    def seeing(self, view: View) -> Iterator[None]:
        """`view` holds inside the block, and what held before holds again after it."""
        before, self.view = self.view, view
        try:
            yield
        finally:
            self.view = before

    def bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as it would run now, whatever view holds when it is called.

        Checkpointing calls a function once more in the backward pass, when other adapters may be active.
        """
        bound = _Bound(self.view)
        self._bound.add(bound)

        def as_now(*args: Any, **kwargs: Any) -> Any:
            if bound.missing:
                raise AdapterStateError(
                    f"adapter {bound.missing!r} was removed between a forward pass and its backward pass",
                    hint="remove adapters when no backward pass is due",
                )
            with self.seeing(bound.view):
                return function(*args, **kwargs)

        return as_now

    def __getstate__(self) -> dict[str, Any]:
        # A copy has run nothing yet and stands in no block: none will end for it, so what is active now stays so until
        # somebody activates something else.
        return {"view": View(self.active)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _suspended=[], _bound=WeakSet())
