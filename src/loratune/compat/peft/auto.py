"""A saved adapter together with the base that it names."""

from __future__ import annotations

import os
from typing import Any

import torch

from loratune.compat.peft.config import LoraConfig, refuse
from loratune.compat.peft.model import DEFAULT, PeftModel
from loratune.compat.peft.tasks import PeftModelForCausalLM
from loratune.errors import ConfigError
from loratune.model import load_base

_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", "bfloat16": "bf16", "float32": "fp32"}


class AutoPeftModelForCausalLM:
    """Only its `from_pretrained` is of use, as in PEFT."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The base that the adapter's config names, loaded by loratune, with the adapter.

        Args:
            kwargs: `dtype` (or `torch_dtype`) for the base, bf16 or fp32, decided by the hardware without it;
                `device_map`, one device for all of it.

        Raises:
            ConfigError: the config names no base, or another task, or an argument is not offered.
        """
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or "auto"
        device = kwargs.pop("device_map", None)
        refuse(kwargs, hint="load the base yourself and use PeftModel.from_pretrained")
        there = LoraConfig.from_pretrained(pretrained_model_name_or_path, revision=revision)
        name = there.base_model_name_or_path
        problems = [] if name else [f"{pretrained_model_name_or_path}: its config names no base model"]
        if there.task_type not in (None, "CAUSAL_LM"):
            problems.append(f"{pretrained_model_name_or_path}: its task is {there.task_type}, not CAUSAL_LM")
        if isinstance(device, dict):
            problems.append("device_map: a model over several devices is not offered")
        if problems:
            raise ConfigError(problems, hint="load the base yourself and use PeftModel.from_pretrained")
        base = load_base(
            str(name),
            dtype=_DTYPES.get(dtype, str(dtype).removeprefix("torch.")),
            device=None if device == "auto" else device or "cpu",
        )
        return PeftModelForCausalLM.from_pretrained(
            base.model, pretrained_model_name_or_path, adapter_name, is_trainable, config, revision=revision
        )
