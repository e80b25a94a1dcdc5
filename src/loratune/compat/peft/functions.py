"""PEFT's functions over a model: wrap it, and move an adapter's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from loratune.adapt import Adapters, adapters, attach
from loratune.adapt.handle import ATTRIBUTE
from loratune.compat.peft.config import LoraConfig, plain, refuse
from loratune.compat.peft.model import DEFAULT, PeftModel, class_for
from loratune.compat.peft.state import read_state, write_state


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = DEFAULT,
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """The model, changed in place, inside a `PeftModel` of the config's task, with a fresh adapter that trains."""
    refuse({"mixed": mixed, "revision": revision})
    kind = class_for(model, getattr(peft_config, "task_type", None))
    return kind(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: nn.Module,
    adapter_name: str = DEFAULT,
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """The model itself with a fresh adapter, without a `PeftModel` around it."""
    del low_cpu_mem_usage
    refuse({"state_dict": state_dict}, hint="name the targets in the config")
    if getattr(model, ATTRIBUTE, None) is None:
        attach(model, plain(peft_config), name=adapter_name)
    else:
        adapters(model).add(plain(peft_config), adapter_name)
    return model


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = DEFAULT,
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The adapter's live tensors under the names of PEFT's files."""
    refuse({"state_dict": state_dict, "save_embedding_layers": save_embedding_layers is True})
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    return read_state(_handle_of(model), adapter_name)


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = DEFAULT,
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Copy tensors into an adapter that is there; returns PEFT's pair of missing and unexpected keys."""
    del low_cpu_mem_usage
    refuse({"ignore_mismatched_sizes": ignore_mismatched_sizes})
    return write_state(_handle_of(model), adapter_name, peft_model_state_dict)


def _handle_of(model: nn.Module) -> Adapters:
    return adapters(model.get_base_model() if isinstance(model, PeftModel) else model)
