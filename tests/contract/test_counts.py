"""`docs/reliability.md` holds what the tests counted: every row, no other, from a run that passed."""

from __future__ import annotations

import re

import pytest

from tests import counts
from tests.contract.house import REPOSITORY

PAGE = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")


def written() -> dict[str, int]:
    table = PAGE.partition("<!-- counts: ")[2].partition("<!-- end of counts -->")[0]
    return {what: int(count) for what, count in re.findall(r"^\| (.+?) \| (\d+) \|", table, re.MULTILINE)}


def test_page_has_the_rows_that_are_counted() -> None:
    assert list(written()) == list(counts.ROWS), "run: make test-full"
    assert all(written().values()), "a row that nothing was counted for"
    assert re.search(r"^Counted by \d+ tests on \d{4}-\d\d-\d\d: passed\.$", PAGE, re.MULTILINE)


def test_fifty_moments_were_killed() -> None:
    assert written()["moment of a kill"] >= 50


def test_page_is_written_between_its_marks() -> None:
    first, *_ = counts.ROWS
    page = counts.with_counts(PAGE, {first: 7}, "Counted by nobody.")
    assert f"\n| {first} | 7 |" in page
    assert page.split("<!-- counts: ")[0] == PAGE.split("<!-- counts: ")[0]
    assert page.split("<!-- end of counts -->")[1] == PAGE.split("<!-- end of counts -->")[1]
    assert counts.with_counts(page, {first: 7}, "Counted by nobody.") == page
    with pytest.raises(ValueError, match="lacks"):
        counts.with_counts("no marks", {}, "")


def test_what_is_counted() -> None:
    first, second, *_ = counts.ROWS
    said = [(counts.PROPERTY, (first, 1)), ("other", 5), (counts.PROPERTY, [first, 2]), (counts.PROPERTY, (second, 1))]
    assert counts.totals(said) == {first: 3, second: 1}
    with pytest.raises(KeyError, match="is no row"):
        counts.named("moment of a kil")
