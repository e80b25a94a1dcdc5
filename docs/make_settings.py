"""docs/settings.md, made from the settings themselves.

python docs/make_settings.py          write it
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from loratune.config import LoraConfig, Settings, TrainConfig, flag_of, group_of

PAGE = Path(__file__).parent / "settings.md"

_HEAD = """# Settings

Made by `python docs/make_settings.py` from the definitions in `src/loratune/config/`; do not edit.

A setting has the same name on the command line (`--batch-size 8`), in a `--config` file and after `--set`
(`batch_size = 8`), and in `loratune.train(..., batch_size=8)`. Where the adapter's settings have another name in PEFT,
both are accepted. Where the default is a dash, what needs a value is decided from the model and the data; the run
prints it with its reason and the record keeps both.
"""


_TABLE = "| option | name | default | range | what it is |\n|---|---|---|---|---|\n"


def page() -> str:
    """The whole page as Markdown."""
    groups: dict[str, list[str]] = {}
    for name, field in TrainConfig.model_fields.items():
        groups.setdefault(group_of(field), []).append(_row(TrainConfig, name))
    only = [_row(LoraConfig, name) for name in LoraConfig.names() if name not in TrainConfig.model_fields]
    groups["Only in `LoraConfig`"] = only
    return "\n".join([_HEAD, *(_section(heading, rows) for heading, rows in groups.items())])


def _section(heading: str, rows: list[str]) -> str:
    return f"## {heading}\n\n{_TABLE}" + "\n".join(rows) + "\n"


def _row(kind: type[Settings], name: str) -> str:
    field = kind.model_fields[name]
    flag = flag_of(name, field)
    limits = _choices(field.annotation) or _range(field.metadata)
    cells = [f"`{flag}`" if flag else "", f"`{name}`", _default(field.default), limits, str(field.description)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _choices(annotation: Any) -> str:
    return ", ".join(f"`{choice}`" for choice in get_args(annotation)) if get_origin(annotation) is Literal else ""


def _default(value: Any) -> str:
    return "–" if value in (None, (), {}) else f"`{value}`"


def _range(metadata: list[Any]) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [(sign, getattr(limit, key, None)) for limit in metadata for key, sign in signs.items()]
    return ", ".join(f"{sign} {limit}" for sign, limit in found if limit is not None and limit != 2**63)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
