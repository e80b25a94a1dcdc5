"""The methods that an adapter can be of, by PEFT's names: which settings each has, and what files call them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from loratune.errors import ConfigError

Method = Literal["LORA", "VERA", "IA3"]
LORA: Method = "LORA"
VERA: Method = "VERA"
IA3: Method = "IA3"
CALLED: dict[str, str] = {LORA: "LoRA", VERA: "VeRA", IA3: "(IA)³"}

# VeRA's rank costs two vectors, not two matrices; PEFT's default too.
VERA_RANK = 256

# The settings of each method, with their names in PEFT's `adapter_config.json`.
_COMMON = {"peft_type": "peft_type", "target_modules": "target_modules", "modules_to_save": "modules_to_save",
           "fan_in_fan_out": "fan_in_fan_out", "task_type": "task_type"}  # fmt: skip
_NAMES: dict[str, dict[str, str]] = {
    VERA: {
        **_COMMON, "r": "r", "lora_dropout": "vera_dropout", "init_lora_weights": "init_weights", "bias": "bias",
        "d_initial": "d_initial", "projection_prng_key": "projection_prng_key", "save_projection": "save_projection",
        "layers_to_transform": "layers_to_transform", "layers_pattern": "layers_pattern",
    },
    IA3: {
        **_COMMON, "exclude_modules": "exclude_modules", "feedforward_modules": "feedforward_modules",
        "init_lora_weights": "init_ia3_weights",
    },
}  # fmt: skip
# What says which modules: a file of another method has no place for it, and names the modules themselves.
CHOOSING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Settings that LoRA itself has not.
_OF_OTHERS = ("d_initial", "projection_prng_key", "save_projection", "feedforward_modules")
# Of "bias": the word for the biases of adapted modules.
_ONLY = {"lora_only": "vera_only"}


def unfit(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[str]:
    """What of the given settings is another method's, unless it is at its default and asks for nothing."""
    method = values.get("peft_type") or LORA
    if not isinstance(method, str) or method not in CALLED:
        return  # reported as a wrong value of its own
    for name, value in values.items():
        known = name not in _OF_OTHERS if method == LORA else name in _NAMES[method] or name in CHOOSING
        if not known and name in defaults and value != defaults[name]:
            yield f"{name}={value!r}: {CALLED[method]} has no such setting"
    init = values.get("init_lora_weights")
    if method != LORA and isinstance(init, str):
        yield f"init_lora_weights={init!r}: of {CALLED[method]} it is True or False"


def settings_of(method: str, names: Iterable[str]) -> list[str]:
    """Of the names of all settings those that the method has."""
    return [name for name in names if (name in _NAMES[method] if method != LORA else name not in _OF_OTHERS)]


def to_file(method: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under the names of a file of this method; LoRA's are those that they have here."""
    if method == LORA:
        return {name: values[name] for name in settings_of(LORA, values)}
    found = {written: values[name] for name, written in _NAMES[method].items() if name in values}
    if found.get("bias") in _ONLY:
        found["bias"] = _ONLY[found["bias"]]
    return found


def from_file(raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings in a file of another method than LoRA, by their names here; and what else stands in it.

    Raises:
        ConfigError: a name that the method writes otherwise.
    """
    method = raw["peft_type"]
    names = {written: name for name, written in _NAMES[method].items()}
    values = {names[key]: value for key, value in raw.items() if key in names}
    if method == VERA:
        words = {written: word for word, written in _ONLY.items()}
        if isinstance(values.get("bias"), str) and values["bias"] in _ONLY:
            raise ConfigError(f"bias={values['bias']!r}: VeRA's files say {_ONLY[values['bias']]!r}")
        if isinstance(values.get("bias"), str):
            values["bias"] = words.get(values["bias"], values["bias"])
    return values, {key: value for key, value in raw.items() if key not in names}


def written_names(method: str) -> frozenset[str]:
    """The settings that a file of this method has a place for; of LoRA all."""
    return frozenset(_NAMES[method]) if method != LORA else frozenset((*_COMMON, *CHOOSING))
