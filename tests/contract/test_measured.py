"""The README's figures are those of the committed results."""

from __future__ import annotations

from tests.contract.house import REPOSITORY
from tests.contract.scripts import script


def test_readme_table_is_made_from_the_committed_result() -> None:
    tables = script("benchmarks/tables.py")
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert tables.with_table(readme, tables.measured()) == readme, "run: python benchmarks/tables.py --write"
    assert "| exact call |" in readme
    assert "Handling adapters beside peft" in readme
