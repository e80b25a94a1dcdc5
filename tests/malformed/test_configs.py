"""Malformed settings: each is what was written, or refused by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loratune.config import TrainConfig, read_settings
from loratune.errors import ConfigError
from tests.malformed.cases import REFUSED, Case, Counted, outcome
from tests.malformed.configs import VALUES, fields, files


def settings_of(path: Path) -> dict[str, Any]:
    given = read_settings(str(path), [], {})
    config = TrainConfig(**given)
    return {name: getattr(config, name) for name in config.model_fields_set if name in given}


@pytest.mark.parametrize("case", list(files()), ids=str)
def test_files(case: Case, tmp_path: Path, counted: Counted) -> None:
    path = case.make(tmp_path)

    def read(path: Path) -> dict[str, Any]:
        try:
            return settings_of(path)
        except ConfigError as error:  # what a setting may be is not for its file to say
            raise ConfigError([f"{path.name}: {problem}" for problem in error.problems], hint=error.hint) from None

    found = outcome(case, path, read)
    assert found is REFUSED if case.result is REFUSED else found == case.result
    counted("malformed input")


@pytest.mark.parametrize(("name", "value"), list(fields()), ids=str)
def test_settings(name: str, value: str, tmp_path: Path, counted: Counted) -> None:
    """What is taken is what was written: nothing is cut, rounded, or made another kind of thing."""
    (tmp_path / "a.toml").write_text(f"{name} = {value}\n")
    try:
        found = settings_of(tmp_path / "a.toml")[name]
    except ConfigError as error:
        said = str(error)
    else:
        written = VALUES[value]
        plain = list(found) if isinstance(found, tuple) else found
        assert plain in (written, [written])
        assert isinstance(plain, bool) == isinstance(written, bool)
        said = name
    assert name in said
    counted("malformed input")
