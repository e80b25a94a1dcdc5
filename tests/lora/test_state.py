"""What is active, and that blocks give back what held before them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratune.lora import AdapterState, Rows, TokenCounter, View
from tests.lora.cases import SLOW

COUNTER = TokenCounter(1, 2, torch.arange(3))
ROWS = Rows(torch.tensor([0, 1]), {})

# Each opens one kind of block; the view inside is the last argument.
BLOCKS: dict[str, tuple[Callable[[AdapterState], AbstractContextManager[None]], View]] = {
    "no adapter": (lambda state: state.suspending(active=()), View((), counter=COUNTER)),
    "another": (lambda state: state.suspending(("c",), active=("c",)), View(("c",), counter=COUNTER)),
    "rows": (
        lambda state: state.suspending(("b", "c"), active=(), rows=ROWS, batch=2),
        View((), rows=ROWS, batch=2, counter=COUNTER),
    ),
    "a view": (lambda state: state.seeing(View(("z",))), View(("z",))),
}


def held(view: View) -> tuple[Any, ...]:
    """What a view says, comparable: its tensors by identity."""
    return view.active, id(view.rows), view.batch, id(view.counter)


def begun() -> AdapterState:
    state = AdapterState(("a", "b"))
    state.change(counter=COUNTER)
    return state


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_changes_the_view_and_gives_it_back(block: str) -> None:
    opened, inside = BLOCKS[block]
    state = begun()
    before = held(state.view)
    with opened(state):
        assert held(state.view) == held(inside)
    assert held(state.view) == before
    assert not state.suspended


@pytest.mark.parametrize("block", BLOCKS)
def test_an_exception_inside_gives_it_back_too(block: str) -> None:
    state = begun()
    before = held(state.view)
    with pytest.raises(KeyError), BLOCKS[block][0](state):
        raise KeyError
    assert held(state.view) == before
    assert not state.suspended
    assert state.used == {"a", "b"}


@SLOW
@given(nest=st.lists(st.sampled_from([*BLOCKS, "counting"]), max_size=6), fails=st.booleans())
def test_nested_in_any_order_each_gives_back_its_own(nest: list[str], fails: bool) -> None:
    state = begun()

    def go(depth: int) -> None:
        if depth == len(nest):
            if fails:
                raise KeyError
            return
        before, suspended, used = held(state.view), state.suspended, state.used
        block = state.counting(TokenCounter(0, depth, torch.arange(1))) if nest[depth] == "counting" else None
        try:
            with block or BLOCKS[nest[depth]][0](state):
                assert before[0] == () or nest[depth] == "a view" or set(before[0]) <= state.used
                go(depth + 1)
        finally:
            assert (held(state.view), state.suspended, state.used) == (before, suspended, used)

    if fails:
        with pytest.raises(KeyError):
            go(0)
    else:
        go(0)


def test_counting_changes_the_counter_alone() -> None:
    state = AdapterState(("a",))
    state.change(rows=ROWS, batch=2)
    with state.counting(COUNTER):
        assert held(state.view) == held(View(("a",), rows=ROWS, batch=2, counter=COUNTER))
    assert held(state.view) == held(View(("a",), rows=ROWS, batch=2))


def test_what_changes_inside_a_block_ends_with_it() -> None:
    state = begun()
    with state.suspending(active=()):
        state.change(active=("z",))
        assert state.active == ("z",)
    assert state.active == ("a", "b")


def test_a_counter_set_inside_a_block_outlives_it() -> None:
    """`counting` may be left inside `suspending`, or the other way round."""
    state = begun()
    counting, suspending = state.counting(TokenCounter(9, 9, torch.arange(1))), state.suspending(active=())
    counting.__enter__()
    suspending.__enter__()
    counting.__exit__(None, None, None)
    assert state.view.counter is COUNTER
    suspending.__exit__(None, None, None)
    assert held(state.view) == held(View(("a", "b"), counter=COUNTER))


def test_what_is_used_counts_what_comes_back() -> None:
    state = AdapterState(("a",))
    assert not state.suspended
    with state.suspending(("b",), active=("b",)), state.suspending(("c", "d"), active=(), rows=ROWS):
        assert state.suspended
        assert state.active == ()
        assert state.used == {"a", "b", "c", "d"}
    assert state.used == {"a"}


def test_a_name_changes_now_and_in_what_comes_back() -> None:
    state = AdapterState(("a", "b"))
    with state.suspending(("a",), active=("a",)):
        state.rename("a", "z")
        assert state.active == ("z",)
        assert state.used == {"z", "b"}
    assert state.active == ("z", "b")


def test_cleared_inside_a_block_nothing_comes_back() -> None:
    state = begun()
    with state.suspending(active=("b",)), state.suspending(active=()):
        state.clear()
        with state.suspending(active=("c",)):
            assert state.active == ("c",)
        assert state.used == frozenset()
    assert held(state.view) == held(View())
    assert not state.suspended


def test_a_bound_function_sees_the_view_it_was_bound_under() -> None:
    state = begun()
    seen = state.bound(lambda first, *, second: (held(state.view), first, second))
    before = held(state.view)
    state.change(active=("z",), counter=None)
    after = held(state.view)
    assert seen(1, second=2) == (before, 1, 2)
    assert held(state.view) == after


def test_a_bound_function_sees_adapters_under_the_names_they_have_by_then() -> None:
    state = begun()
    seen = state.bound(lambda: held(state.view))
    state.rename("a", "z")
    state.change(active=())
    assert seen() == held(View(("z", "b"), counter=COUNTER))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
def test_a_copy_has_the_same_active_for_good_and_goes_its_own_way(how: Callable[[AdapterState], AdapterState]) -> None:
    """It stands in no block: none would ever end for it."""
    state = AdapterState(("a", "b"))
    bound = state.bound(lambda: state.active)
    with state.counting(COUNTER), state.suspending(("c",), active=("c",), batch=2):
        twin = how(state)
    assert (twin.view, twin.used, twin.suspended) == (View(("c",)), {"c"}, False)
    twin.rename("c", "z")
    assert twin.bound(lambda: twin.active)() == ("z",)
    assert bound() == state.active == ("a", "b")


def test_a_bound_function_that_raises_leaves_the_view_alone() -> None:
    state = begun()

    def fail() -> None:
        raise KeyError

    bound = state.bound(fail)
    state.change(active=())
    view = state.view
    with pytest.raises(KeyError):
        bound()
    assert state.view is view


def test_a_view_is_replaced_and_never_changed() -> None:
    state = begun()
    view = state.view
    state.change(active=("z",))
    assert view.active == ("a", "b")
    assert state.view is not view
