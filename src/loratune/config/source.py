"""Settings from a TOML or YAML file, from `key=value` words and from flags: later ones win, unknown keys are errors."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loratune.errors import ConfigError


def read_settings(file: str | None, words: Sequence[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """One dictionary of settings by name; flags win over words, words over the file.

    Args:
        words: `name=value`, the value written as in TOML; a bare word is a string.

    Raises:
        ConfigError: the file is missing or malformed, or a word has no `=`.
    """
    settings = dict(_from_file(Path(file))) if file else {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set {word!r}: write name=value")
        settings[name.strip().replace("-", "_")] = _value(value.strip())
    settings.update({name: value for name, value in flags.items() if value is not None})
    return settings


def _from_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if path.suffix in (".yaml", ".yml"):
        return _mapping(path, _yaml(path, text))
    if path.suffix != ".toml":
        raise ConfigError(f"{path}: a config file ends in .toml, .yaml or .yml")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None


def _yaml(path: Path, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {error}") from None


def _mapping(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or any(not isinstance(key, str) for key in value):
        raise ConfigError(f"{path}: settings are written as name: value")
    # YAML 1.1 reads 1e-3 as a string; numbers are what is meant.
    return {key: _number(item) if isinstance(item, str) else item for key, item in value.items()}


def _number(text: str) -> Any:
    return float(text) if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", text) else text


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
