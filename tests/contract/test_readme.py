"""What README.md shows exists: its commands and their options, its make targets, its Python names."""

from __future__ import annotations

import functools
import importlib
import os
import re
import subprocess
import sys

from tests.contract import readme
from tests.contract.house import REPOSITORY


@functools.cache
def page() -> str:
    return (REPOSITORY / "README.md").read_text(encoding="utf-8")


@functools.cache
def help_of(command: str) -> str | None:
    """The help of `loratune COMMAND`, wide enough that no option is cut; None when there is no such command."""
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY / "src"),
        "COLUMNS": "400",
        "NO_COLOR": "1",
        "TERM": "dumb",
    }
    arguments = [sys.executable, "-m", "loratune", *([command] if command else []), "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment)
    return done.stdout if done.returncode == 0 else None


def options_of(command: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z0-9-]*", help_of(command) or ""))


def missing_commands(text: str) -> list[str]:
    found = []
    for command in readme.commands(text):
        if help_of(command.name) is None:
            found.append(f"loratune {command.name}")
        else:
            found += [
                f"loratune {command.name} {name}" for name in command.options if name not in options_of(command.name)
            ]
    known = set().union(*(options_of(command.name) for command in readme.commands(text)))
    return found + [name for name in readme.loose_options(text) if name not in known]


def missing_names(text: str) -> list[str]:
    names = {name for block in readme.python_blocks(text) for name in readme.loratune_names(block)}
    return sorted(name for name in names if not _resolves(name))


def _resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    value: object = importlib.import_module(parts[0])
    for end, part in enumerate(parts[1:], start=2):
        if not hasattr(value, part):
            try:
                value = importlib.import_module(".".join(parts[:end]))
            except ModuleNotFoundError:
                return False
        else:
            value = getattr(value, part)
    return True


def test_commands_and_options_exist() -> None:
    assert readme.commands(page()), "README.md shows no command"
    assert missing_commands(page()) == []


def test_python_names_exist() -> None:
    assert readme.python_blocks(page()), "README.md shows no Python"
    assert missing_names(page()) == []


def test_make_targets_exist() -> None:
    rules = re.findall(r"^([a-z][a-z-]*):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"demo", "test"} <= set(readme.make_targets(page()))
    assert set(readme.make_targets(page())) <= set(rules)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert re.search(r"^make test\b", (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)


PLANTED = """
Run `loratune fly`, or with `--no-such-option`; `make demo` first.

```sh
$ HF_HUB_OFFLINE=1 loratune train model.gguf rows.jsonl \\
    --no-such-flag=3 --json   # it's a comment
cat rows.jsonl | .venv/bin/loratune --version
```

```python
import loratune as lt
from loratune.compat.nothing import LoraConfig
lora = lt.no_such_verb(model)
print(lora.summary())
```
"""


def test_reader_reads() -> None:
    assert [command.name for command in readme.commands(PLANTED)] == ["train", "", "fly"]
    assert readme.commands(PLANTED)[0].options == ("--no-such-flag", "--json")
    assert readme.loose_options(PLANTED) == ["--no-such-option"]
    assert readme.make_targets(PLANTED) == ["demo"]
    (block,) = readme.python_blocks(PLANTED)
    assert readme.loratune_names(block) == ["loratune", "loratune.compat.nothing.LoraConfig", "loratune.no_such_verb"]


def test_guard_sees_planted_names() -> None:
    missing = missing_commands(PLANTED)
    assert "loratune train --no-such-flag" in missing
    assert "loratune train --json" not in missing
    assert "loratune fly" in missing
    assert "--no-such-option" in missing
    assert missing_names(PLANTED) == ["loratune.compat.nothing.LoraConfig", "loratune.no_such_verb"]
