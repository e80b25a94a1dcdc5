"""A saved adapter together with the base that it names."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch

from loratune.compat.peft.config import LoraConfig, refuse
from loratune.compat.peft.model import DEFAULT, MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from loratune.errors import ConfigError
from loratune.model import load_base

_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", "bfloat16": "bf16", "float32": "fp32"}

# transformers' class for a base of each task; those that are loaded here have none.
_LOADED_BY_HAND = {
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


class AutoPeftModel:
    """A saved adapter of whatever task its config names. Only its `from_pretrained` is of use, as in PEFT."""

    task: ClassVar[str | None] = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The base that the adapter's config names, loaded by loratune, with the adapter.

        Args:
            import_allowlist: means nothing here, where no file names code to import.
            kwargs: `dtype` (or `torch_dtype`) for the base, bf16 or fp32, decided by the hardware without it;
                `device_map`, one device for all of it.

        Raises:
            ConfigError: the config names no base or another task, the task's base is not one that loratune loads, or
                an argument is not offered; all of it is said at once.
        """
        del import_allowlist
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or "auto"
        device = kwargs.pop("device_map", None)
        refuse(kwargs, hint="load the base yourself and use PeftModel.from_pretrained")
        there = LoraConfig.from_pretrained(pretrained_model_name_or_path, revision=revision)
        name, task = there.base_model_name_or_path, cls.task or there.task_type
        problems = [] if name else [f"{pretrained_model_name_or_path}: its config names no base model"]
        if task is None:
            problems.append(f"{pretrained_model_name_or_path}: its config names no task, so take the task's own class")
        elif there.task_type not in (None, task):
            problems.append(f"{pretrained_model_name_or_path}: its task is {there.task_type}, not {task}")
        elif task in _LOADED_BY_HAND:
            problems.append(f"{cls.__name__}: loratune loads bases of the task CAUSAL_LM alone, not of {task}")
        if isinstance(device, dict):
            problems.append("device_map: a model over several devices is not offered")
        if problems:
            raise ConfigError(problems, hint=_by_hand(task, name or "the base"))
        base = load_base(
            str(name),
            dtype=_DTYPES.get(dtype, str(dtype).removeprefix("torch.")),
            device=None if device == "auto" else device or "cpu",
        )
        return MODEL_TYPE_TO_PEFT_MODEL_MAPPING[str(task)].from_pretrained(
            base.model, pretrained_model_name_or_path, adapter_name, is_trainable, config, revision=revision
        )


class AutoPeftModelForCausalLM(AutoPeftModel):
    task = "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    task = "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    task = "SEQ_CLS"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    task = "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    task = "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    task = "FEATURE_EXTRACTION"


def _by_hand(task: str | None, base: str) -> str:
    if task not in _LOADED_BY_HAND:
        return "load the base yourself and use PeftModel.from_pretrained"
    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task].__name__
    return f"transformers' {_LOADED_BY_HAND[task]}.from_pretrained({base!r}), then {kind}.from_pretrained of it"
