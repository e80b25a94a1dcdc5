"""`LoraConfig`: what an adapter is. Field names are PEFT's, flags are the command line's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import field_validator

from loratune.config.peft_keys import DESCRIPTIVE, NEUTRAL, asks_for_something
from loratune.config.setting import Settings, setting
from loratune.errors import nearest

ALL_LINEAR = "all-linear"
InitName = Literal["gaussian"]
TaskType = Literal["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]

_ADAPTER = "Adapter"


class LoraConfig(Settings):
    """The settings of one low-rank adapter; every wrong one is reported at once.

    Raises:
        ConfigError: with one line for each problem, and the nearest valid spelling of an unknown name.
    """

    r: int = setting(
        8, "rank of the update: ΔW = scale · B A with A (r, in) and B (out, r)", flag="rank", group=_ADAPTER, ge=1
    )
    lora_alpha: float = setting(
        16,
        "numerator of the scale: alpha / r, or alpha / √r with rsLoRA",
        flag="alpha",
        group=_ADAPTER,
        gt=0,
    )
    lora_dropout: float = setting(
        0.0, "dropout on the input of A, in training only", flag="dropout", group=_ADAPTER, ge=0, lt=1
    )
    target_modules: str | tuple[str, ...] | None = setting(
        None,
        "modules to adapt: 'all-linear', names or dotted suffixes, or a regex for the full path",
        flag="targets",
        group=_ADAPTER,
    )
    exclude_modules: str | tuple[str, ...] | None = setting(
        None, "modules to leave alone, written like the targets", flag="exclude", group=_ADAPTER
    )
    layers_to_transform: tuple[int, ...] | None = setting(
        None, "indices of the layers to adapt; all when not given", flag="layers", group=_ADAPTER
    )
    layers_pattern: tuple[str, ...] | None = setting(None, "name of the list of layers, where it is not found", flag="")
    rank_pattern: dict[str, int] = setting({}, "another rank for paths that match a regex", flag="")
    alpha_pattern: dict[str, float] = setting({}, "another alpha for paths that match a regex", flag="")
    use_rslora: bool = setting(
        False, "scale by alpha / √r (rank-stabilised LoRA, arXiv:2312.03732)", flag="rslora", group=_ADAPTER
    )
    init_lora_weights: bool | InitName = setting(
        True,
        "start of A (B is zero): true = Kaiming uniform, gaussian = N(0, 1/r²), false = B random too",
        flag="init",
        group=_ADAPTER,
    )
    fan_in_fan_out: bool = setting(
        False, "weights stored (in, out); found from the module, kept for PEFT's files", flag=""
    )
    task_type: TaskType | None = setting(None, "what the model is used for; found from the model", flag="")

    @classmethod
    def prepare(cls, values: dict[str, Any], problems: list[str]) -> dict[str, Any]:
        """PEFT's keys at their neutral value ask for nothing; at another value they ask for what is not here."""
        asked = [key for key in values if key in NEUTRAL and asks_for_something(key, values[key])]
        problems += [f"{key}={values[key]!r}: not implemented, only {NEUTRAL[key]!r} is" for key in asked]
        kept = {key: value for key, value in values.items() if key not in NEUTRAL and key not in DESCRIPTIVE}
        return super().prepare(kept, problems)

    @field_validator("target_modules", "exclude_modules", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return value if value is None or isinstance(value, str) else _strings(value)

    @field_validator("layers_pattern", mode="before")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        return _strings([value]) if isinstance(value, str) else value if value is None else _strings(value)

    @field_validator("layers_to_transform", mode="before")
    @classmethod
    def _indices(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            value = [value]
        if isinstance(value, Iterable) and not isinstance(value, str):
            value = tuple(value)
            if any(not isinstance(index, int) or index < 0 for index in value):
                raise ValueError("layer indices are whole numbers from 0")
        return value

    @field_validator("lora_alpha", "lora_dropout", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("is not a number")
        return value

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _init(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "gaussian":
            raise ValueError(f"no such initialisation{nearest(value, ['gaussian'])}; there are True, False, 'gaussian'")
        return value

    @field_validator("target_modules", "exclude_modules")
    @classmethod
    def _regex_compiles(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(value, str) and value != ALL_LINEAR:
            _compile(value)
        if value in ((), ""):
            raise ValueError("names nothing")
        return value

    @field_validator("fan_in_fan_out", mode="before")
    @classmethod
    def _unset_fan(cls, value: Any) -> Any:
        return False if value is None else value

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _pattern_keys(cls, value: Any) -> Any:
        if value is None:
            return {}
        if isinstance(value, Mapping):
            for key, number in value.items():
                _compile(str(key))
                if isinstance(number, bool) or not isinstance(number, int | float) or number <= 0:
                    raise ValueError(f"{key!r}: {number!r} is not a positive number")
        return value

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


def _strings(value: Any) -> Any:
    """Lists and sets of names as a tuple without repeats; sets sorted, since their order is not the user's."""
    if isinstance(value, set | frozenset):
        value = sorted(value)
    if isinstance(value, list | tuple):
        bad = [item for item in value if not isinstance(item, str) or not item]
        if bad:
            raise ValueError(f"{bad[0]!r} is not a module name")
        return tuple(dict.fromkeys(value))
    return value


def _compile(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
