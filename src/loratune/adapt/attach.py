"""`attach`: a model gets its first adapter."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from torch import nn

from loratune.adapt.compiled import inside_compiled
from loratune.adapt.handle import ATTRIBUTE, Adapters
from loratune.adapter import SavedAdapter
from loratune.config import LoraConfig
from loratune.errors import AdapterStateError, ConfigError
from loratune.lora import Adapting, base_modules


def attach(
    model: nn.Module,
    config_or_path: LoraConfig | str | os.PathLike[str] | SavedAdapter,
    *,
    name: str = "default",
    trainable: bool | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
    any_base: bool = False,
) -> Adapters:
    """Give a model its first adapter, active: fresh from a `LoraConfig`, or a saved one from a folder or hub id.

    The model keeps its identity and its modules theirs; its own parameters stop requiring gradients. A fresh adapter
    is trainable and computes the base's function; a saved one is frozen unless `trainable`. Of a model that
    `torch.compile` has wrapped, the one inside is adapted, and the wrapper computes with the adapter.

    Args:
        dtype: of A and B; fp32 unless given (saved ones keep bf16 or fp16).
        tokenizer: the one at hand; a saved adapter of another one is refused.
        any_base: accept a saved adapter of another base, if it has the same modules and shapes.

    Raises:
        TargetError: a target that matches nothing, with the names there are; the model is unchanged.
        AdapterStateError: the model has adapters already (use `add` or `load` of its handle).
        AdapterFileError: the folder's files are damaged or do not fit.
    """
    given: object = config_or_path
    if not isinstance(given, LoraConfig | str | os.PathLike | SavedAdapter):
        kind = type(given).__name__
        raise ConfigError(f"a {kind} describes no adapter", hint="give a LoraConfig, or the folder of a saved adapter")
    refuse_adapted(model, hint="use adapters(model).add(...) or .load(...)")
    model = inside_compiled(model)
    handle = Adapters(model)
    if isinstance(config_or_path, LoraConfig):
        handle.add(config_or_path, name, dtype=dtype)
        if trainable is False:
            handle.freeze(name)
    else:
        handle.load(
            config_or_path,
            name,
            trainable=bool(trainable),
            dtype=dtype,
            tokenizer=tokenizer,
            any_base=any_base,
        )
    for _, parameter in handle.base_parameters():
        parameter.requires_grad_(False)
    handle.activate(name)
    setattr(model, ATTRIBUTE, handle)
    return handle


def refuse_adapted(model: nn.Module, *, hint: str) -> None:
    """Raise where adapters stand on the model."""
    if getattr(model, ATTRIBUTE, None) is not None or any(isinstance(m, Adapting) for _, m in base_modules(model)):
        raise AdapterStateError("this model has adapters already", hint=hint)


def adapters(model: nn.Module) -> Adapters:
    """The handle of a model that has adapters."""
    handle = getattr(model, ATTRIBUTE, None)
    if handle is None:
        raise AdapterStateError("this model has no adapters", hint="attach one first")
    return cast(Adapters, handle)
