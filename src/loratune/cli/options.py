"""Command-line options made from the settings' definitions: one option for each flag, one place for its words."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from loratune.config import TrainConfig, flag_of, group_of, read_word

_PLAIN = (int, float, bool, str)


def settings_options(
    leave_out: Collection[str] = (), groups: Collection[str] | None = None, also: Collection[str] = ()
) -> list[inspect.Parameter]:
    """A keyword parameter for every setting of `TrainConfig` that has a flag; all default to "not given".

    Args:
        leave_out: names of settings without one. groups: whose settings have one, where not all do.
        also: names beside these groups'.
    """
    parameters = []
    for name, field in TrainConfig.model_fields.items():
        flag = flag_of(name, field)
        wanted = groups is None or group_of(field) in groups or name in also
        if flag is None or name in leave_out or not wanted:
            continue
        kind = _option_type(field.annotation)
        names = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
        help_text = str(field.description) + _default_words(field.default)
        option = typer.Option(*names, help=help_text, rich_help_panel=group_of(field), show_default=False)
        annotation = Annotated[Union[kind, None], option]  # type: ignore[valid-type]  # noqa: UP007
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return parameters


def with_settings(
    leave_out: Collection[str] = (), groups: Collection[str] | None = None, also: Collection[str] = ()
) -> Callable[[Any], Any]:
    """Decorator: replaces a command's `**settings` by one option for each setting."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        command.__signature__ = inspect.Signature([*own, *settings_options(leave_out, groups, also)])  # type: ignore[attr-defined]
        return command

    return decorate


def parse_given(flags: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, with words of the command line turned into values."""
    return {
        name: read_word(name, value) if isinstance(value, str) else value
        for name, value in flags.items()
        if value is not None
    }


def _option_type(annotation: Any) -> Any:
    """What typer parses: a plain type or choices; everything richer is a word that `parse_given` reads."""
    members = [m for m in get_args(annotation) if m is not types.NoneType] if _is_union(annotation) else [annotation]
    if len(members) == 1:
        (only,) = members
        if only in _PLAIN or get_origin(only) is Literal:
            return only
    return str


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _default_words(default: Any) -> str:
    if default is None or default in ((), {}):
        return ""
    return f" (default {default})"
