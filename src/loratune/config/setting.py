"""How a setting is written down once, and how a bad value is reported.

A setting is a pydantic field made by `setting(...)`: type, default, range, help, and the name of its
command-line flag. Command lines, config files and reference pages are derived from these fields.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from loratune.errors import ConfigError, nearest


def setting(default: Any, help: str, *, flag: str | None = None, group: str = "", **limits: Any) -> Any:
    """One setting.

    Args:
        default: its value when nobody names it; `None` on a train setting means "decide from model and data".
        help: one line for `--help` and the reference page.
        flag: the command-line name without dashes if it differs from the field's; `""` for none.
        group: heading under which `--help` lists it.
        limits: pydantic constraints (`ge`, `gt`, `le`, `lt`, `pattern`).
    """
    return Field(default=default, description=help, json_schema_extra={"flag": flag, "group": group}, **limits)


def like(kind: type[Settings], name: str, default: Any) -> Any:
    """The setting `name` of another class with another default: its help, flag and range are written once, there."""
    field = copy.copy(kind.model_fields[name])
    field.default = default
    return field


def flag_of(name: str, field: FieldInfo) -> str | None:
    """The command-line flag of a field (`--rank`), or None where it has none."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict), f"{name} was not made by setting()"
    flag = extra["flag"]
    if flag == "":
        return None
    return "--" + str(flag or name.replace("_", "-"))


def group_of(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["group"])


class Settings(BaseModel):
    """A frozen set of settings that reports every wrong one at once as a `ConfigError`."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=False
    )

    def __init__(self, **values: Any) -> None:
        problems: list[str] = []
        values = self.prepare(values, problems)
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems += problems_of(type(self), error)
        if problems:
            raise ConfigError(problems, hint="docs/settings.md lists every setting with its range")

    @classmethod
    def prepare(cls, values: dict[str, Any], problems: list[str]) -> dict[str, Any]:
        """Look at all values before they are validated one by one; here they get their field's name."""
        return cls.by_field(values, problems)

    @classmethod
    def by_field(cls, values: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
        """Put values given by their flag's name (`rank`) under their field's name (`r`); note contradictions."""
        field_of = cls.aliases()
        found: dict[str, Any] = {}
        for given, value in values.items():
            name = field_of.get(given, given)
            if name in found and found[name] != value:
                problems.append(f"{given}={value!r} contradicts {name}={found[name]!r}: they are one setting")
            found[name] = value
        return found

    @classmethod
    def aliases(cls) -> dict[str, str]:
        """Flag names, underscored, to the field names they stand for, where the two differ."""
        flags = {name: flag_of(name, field) for name, field in cls.model_fields.items()}
        return {f[2:].replace("-", "_"): name for name, f in flags.items() if f and f[2:].replace("-", "_") != name}

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(cls.model_fields)

    def replace(self, **values: Any) -> Any:
        """A copy with some settings changed, validated again."""
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **values})


def problems_of(kind: type[Settings], error: ValidationError) -> Iterator[str]:
    seen: set[str] = set()
    valid = [*kind.names(), *kind.aliases()]
    for item in error.errors():
        name = str(item["loc"][0]) if item["loc"] else ""
        if item["type"] == "extra_forbidden":
            yield f"unknown setting {name!r}{nearest(name, valid)}"
            continue
        message = _sentence(item["type"], item["msg"], item.get("ctx", {}))
        value = item["input"]
        # A union reports one error for each of its members: one line for each setting is enough.
        if name in seen:
            continue
        seen.add(name)
        yield f"{name}={value!r}: {message}" if name else message


def _sentence(kind: str, message: str, context: dict[str, Any]) -> str:
    if kind == "value_error":
        return str(context.get("error", message))
    return message[:1].lower() + message[1:]
