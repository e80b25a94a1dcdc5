"""Held-out rows: how many, which, and which of them leak."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratune.data.read import Corpus, read
from loratune.data.split import Split, split
from loratune.errors import ConfigError, DataError

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}


def corpus(*texts: str) -> Corpus:
    return read([{"text": text} for text in texts])


def numbered(rows: int) -> Corpus:
    return corpus(*(f"row {n}" for n in range(rows)))


def val_rows(result: Split) -> list[int]:
    return [example.place.row for example in result.val]


@given(rows=st.integers(2, 40), val=st.one_of(st.integers(0, 39), st.floats(0, 0.99)), seed=st.integers())
def test_nothing_is_lost_and_order_is_kept(rows: int, val: float, seed: int) -> None:
    if val >= rows or (0 < val < 1 and max(1, round(val * rows)) >= rows):
        return
    data = numbered(rows)
    result = split(data, val, seed)
    assert len(result.val) == (val if val >= 1 or val == 0 else max(1, round(val * rows)))
    assert sorted((*result.train, *result.val), key=lambda e: e.place.row) == list(data.examples)
    assert [e.place.row for e in result.train] == sorted(e.place.row for e in result.train)
    assert val_rows(result) == sorted(val_rows(result))
    assert result.duplicates == ()


def test_the_seed_decides() -> None:
    data = numbered(50)
    assert split(data, 10, 1) == split(data, 10, 1)
    assert len({tuple(val_rows(split(data, 10, seed))) for seed in range(5)}) == 5
    assert split(data, 0.2, 3).val == split(data, 10, 3).val


def test_every_row_is_held_out_about_as_often() -> None:
    data = numbered(10)
    often = [sum(row in val_rows(split(data, 3, seed)) for seed in range(300)) for row in range(1, 11)]
    assert all(50 < count < 130 for count in often), often


def test_another_process_holds_out_the_same_rows() -> None:
    code = (
        "from loratune.data.read import read\nfrom loratune.data.split import split\n"
        "data = read([{'text': f'row {n}'} for n in range(30)])\n"
        "print([e.place.row for e in split(data, 5, 7).val])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert run.stdout.strip() == str(val_rows(split(numbered(30), 5, 7)))


def test_a_row_more_hardly_moves_the_others() -> None:
    before = {e.text for e in split(numbered(100), 20, 0).val}
    after = {e.text for e in split(numbered(101), 20, 0).val}
    assert len(before & after) >= 19


@given(seed=st.integers(0, 1000))
def test_equal_rows_stay_on_one_side(seed: int) -> None:
    data = corpus("a", "b", "a", "c", "b", "d", "e", "a")
    result = split(data, 2, seed)
    assert len(result.val) == 2
    assert result.duplicates == ()


def test_equal_rows_that_cannot_stay_together_are_reported() -> None:
    result = split(corpus("a", "a", "a", "a"), 1, 0)
    assert len(result.val) == 1
    assert [(str(train), str(val)) for train, val in result.duplicates] == [
        (str(result.train[0].place), str(result.val[0].place))
    ]


def test_a_separate_corpus_is_the_validation_set() -> None:
    data, other = corpus("a", "b", "a"), corpus("c", "a", "a")
    result = split(data, other, 0)
    assert (result.train, result.val) == (data.examples, other.examples)
    assert [(train.row, val.row) for train, val in result.duplicates] == [(1, 2), (1, 3)]


@pytest.mark.parametrize("val", [-1, -0.1, 1.5, True, "0.1", float("nan"), float("inf"), None])
def test_impossible_values(val: object) -> None:
    with pytest.raises(ConfigError) as caught:
        split(numbered(5), val, 0)  # type: ignore[arg-type]
    assert caught.value.hint


@pytest.mark.parametrize("val", [5, 6, 0.95, 5.0])
def test_something_must_be_left_to_train_on(val: float) -> None:
    with pytest.raises(DataError, match="of 5 rows: none would be left") as caught:
        split(numbered(5), val, 0)
    assert "--val 0" in caught.value.hint
