"""Settings from a TOML or YAML file, from `key=value` words and from flags: later ones win, unknown keys are errors."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loratune.config.train import TrainConfig
from loratune.config.words import WORDS
from loratune.errors import ConfigError

# The schema of YAML 1.2 where 1.1, which the parser implements, reads something else.
_YAML_1_2 = {
    "tag:yaml.org,2002:bool": (re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "tag:yaml.org,2002:float": (
        re.compile(r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
        list("-+.0123456789"),
    ),
}


def read_settings(file: str | None, words: Sequence[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """One dictionary of settings by name; flags win over words, words over the file.

    Args:
        words: `name=value`, the value written as in TOML, or bare as its flag takes it: `targets=q_proj,v_proj`.

    Raises:
        ConfigError: the file is missing or malformed, a word has no `=` or cannot be read, or a source contradicts
            itself.
    """
    given: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set {word!r}: write name=value")
        name = name.strip().replace("-", "_")
        given[name] = _value(TrainConfig.aliases().get(name, name), value.strip())
    sources = (
        _from_file(Path(file)) if file else {},
        given,
        {name: value for name, value in flags.items() if value is not None},
    )
    problems: list[str] = []
    settings: dict[str, Any] = {}
    for source in sources:
        # One setting has one name before sources meet, so that `--rank` wins over a file's `r`.
        settings.update(TrainConfig.by_field(source, problems))
    if problems:
        raise ConfigError(problems)
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
    except (ValueError, RecursionError) as error:  # also whole numbers of thousands of digits
        raise ConfigError(f"{path}: {_why(error)}") from None


def _why(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _yaml(path: Path, text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Numbers and booleans as in YAML 1.2: 1e-3 is a number, on and off are words (`recompute: on`).

        A name that stands there twice is an error, not the last one of them.
        """

        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [(tag, regex) for tag, regex in resolvers if tag not in _YAML_1_2]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode)]
            for name, own in node.value:
                if names.count(name.value) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"{name.value!r} twice", own.start_mark)
            return super().construct_mapping(node, deep)

    for tag, (regex, first) in _YAML_1_2.items():
        Loader.add_implicit_resolver(tag, regex, first)
    try:
        return yaml.load(text, Loader)  # noqa: S506
    # Values of a tag that are none (!!int abc) come out as whatever their reader stumbles over.
    except (yaml.YAMLError, RecursionError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path}: {_why(error)}") from None


def _mapping(path: Path, value: Any) -> dict[str, Any]:
    if value is None:  # nothing but comments
        return {}
    if not isinstance(value, dict) or any(not isinstance(key, str) for key in value):
        raise ConfigError(f"{path}: settings are written as name: value")
    return value


def _value(name: str, text: str) -> Any:
    value = _structured(text)
    # A number is as bare as a word: `layers=3` names one layer.
    is_bare = value == text or type(value) in (int, float)
    return WORDS[name](text) if is_bare and name in WORDS else value


def _structured(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except (ValueError, RecursionError):
        pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
