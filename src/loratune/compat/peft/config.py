"""`LoraConfig` with PEFT's defaults and its facts about the file, and PEFT's enumerations."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr

from loratune.adapter import SavedAdapter, adapter_folder, config_to_json, read_config
from loratune.config import LoraConfig as OurLoraConfig
from loratune.config.methods import from_file, settings_of, to_file
from loratune.config.setting import like
from loratune.errors import ConfigError
from loratune.files import write_json

# What a PEFT config says about its file and its use; settable, as in PEFT. `LoraConfig` itself is frozen.
_FACTS = ("base_model_name_or_path", "revision", "inference_mode")


class TaskType(enum.StrEnum):
    """What the base is used for, as in PEFT."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"  # noqa: S105
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftWarning(UserWarning):
    """What the code under PEFT's names warns with."""


class PeftType(enum.StrEnum):
    """PEFT's methods that are here."""

    LORA = "LORA"
    VERA = "VERA"
    IA3 = "IA3"


class LoraConfig(OurLoraConfig):
    """`loratune.LoraConfig` with PEFT's default alpha (8); a wrong value is a `ConfigError`.

    Attributes:
        base_model_name_or_path, revision: of the base the adapter was trained on.
        inference_mode: whether the adapter is frozen.
    """

    lora_alpha: float = like(OurLoraConfig, "lora_alpha", 8)

    _facts: dict[str, Any] = PrivateAttr(default_factory=dict)

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self._facts.update({name: values[name] for name in _FACTS if name in values})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FACTS:
            self._facts[name] = value
        elif name in type(self).model_fields:
            raise ConfigError(f"{name}: a config does not change", hint=f"make another one: config.replace({name}=...)")
        else:
            super().__setattr__(name, value)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json` alone."""
        refuse(kwargs)
        saved = SavedAdapter(plain(self), {}, {}, self.base_model_name_or_path, self.revision)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "adapter_config.json", config_to_json(saved))

    def replace(self, **values: Any) -> Any:
        """A copy with some settings changed, by PEFT's names, validated again."""
        kept = {name: getattr(self, name) for name in self.model_fields_set if name != "peft_type"}
        return type(self)(**{**to_file(self.peft_type, kept), **values})

    @property
    def base_model_name_or_path(self) -> str | None:
        return self._fact("base_model_name_or_path")

    @property
    def revision(self) -> str | None:
        return self._fact("revision")

    @property
    def inference_mode(self) -> bool:
        return bool(self._facts.get("inference_mode", False))

    @property
    def is_prompt_learning(self) -> bool:
        return False

    def to_dict(self) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in _FACTS}
        return {**to_file(self.peft_type, self.model_dump()), **facts}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> LoraConfig:
        """The config of a saved adapter."""
        there = read_config(folder_of(pretrained_model_name_or_path, kwargs))
        return of_plain(there.config, base_model_name_or_path=there.base, revision=there.revision, inference_mode=True)

    def _fact(self, name: str) -> str | None:
        value = self._facts.get(name)
        return None if value is None else str(value)


class VeraConfig(LoraConfig):
    """Settings of VeRA under PEFT's names; a wrong value is a `ConfigError`."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**_named(PeftType.VERA, values))

    @property
    def vera_dropout(self) -> float:
        return self.lora_dropout

    @property
    def init_weights(self) -> bool:
        return bool(self.init_lora_weights)


class IA3Config(LoraConfig):
    """Settings of (IA)³ under PEFT's names; a wrong value is a `ConfigError`."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**_named(PeftType.IA3, values))

    @property
    def init_ia3_weights(self) -> bool:
        return bool(self.init_lora_weights)


# PEFT's base class of all configs; here it is LoRA's, whose settings are those of all methods.
PeftConfig = LoraConfig
PEFT_TYPE_TO_CONFIG_MAPPING: dict[PeftType, type[LoraConfig]] = {
    PeftType.LORA: LoraConfig,
    PeftType.VERA: VeraConfig,
    PeftType.IA3: IA3Config,
}


def _named(method: PeftType, values: dict[str, Any]) -> dict[str, Any]:
    """Settings of a method by their names here; what has none is left for the config to refuse."""
    named, others = from_file({**values, "peft_type": method.value})
    return {**named, **others}


def plain(config: object) -> Any:
    """The config as the handle keeps it; what is no config of ours passes, for the handle to refuse."""
    if not isinstance(config, LoraConfig):
        return config
    return OurLoraConfig(**_asked(config))


def of_plain(config: OurLoraConfig, **facts: Any) -> LoraConfig:
    """A config of the handle under PEFT's name."""
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(config.peft_type)]
    return kind(**to_file(config.peft_type, _asked(config)), **facts)


def _asked(config: OurLoraConfig) -> dict[str, Any]:
    """All settings of the config's method."""
    names = settings_of(config.peft_type, OurLoraConfig.names())
    return {name: getattr(config, name) for name in names}


def folder_of(path: str | os.PathLike[str], options: dict[str, Any]) -> Path:
    """The adapter's folder: a local one, or a hub's of the `revision` in the options; `subfolder` goes into it."""
    refuse({name: value for name, value in options.items() if name not in ("revision", "subfolder", *_READING)})
    return adapter_folder(path, revision=options.get("revision")) / (options.get("subfolder") or "")


# How PEFT fetches and reads a file; a hub's own settings say the same, and only safetensors are read here.
_READING = (
    "cache_dir", "force_download", "local_files_only", "token", "torch_device", "use_auth_token", "use_safetensors",
)  # fmt: skip


def refuse(asked: dict[str, Any], *, hint: str = "leave it out") -> None:
    """An argument of PEFT's that has no effect here may not ask for one."""
    problems = [f"{name}={value!r} is not offered here" for name, value in asked.items() if value not in (None, False)]
    if problems:
        raise ConfigError(problems, hint=hint)
