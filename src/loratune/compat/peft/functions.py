"""PEFT's functions over a model: wrap it, look at it, and move an adapter's tensors or its base's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from loratune.adapt import Adapters, adapters, attach
from loratune.adapt.handle import ATTRIBUTE
from loratune.adapter import read_adapter, to_keys
from loratune.compat.peft.config import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    LoraConfig,
    PeftType,
    folder_of,
    plain,
    refuse,
)
from loratune.compat.peft.model import DEFAULT, PeftModel, class_for
from loratune.compat.peft.state import read_state, write_base_state, write_state
from loratune.compat.peft.status import TunerLayerStatus, TunerModelStatus, layer_status, model_status
from loratune.errors import ConfigError
from loratune.model import pick_device


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


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | None = None,
    key_mapping: dict[str, str] | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """The tensors of a saved adapter under the names of PEFT's files, on `device` or the fastest there is.

    Raises:
        AdapterFileError: the files are missing, damaged, or hold something else.
    """
    kwargs.pop("user_agent", None)
    refuse({"key_mapping": key_mapping})
    where = pick_device(device)
    return {key: tensor.to(where) for key, tensor in to_keys(read_adapter(folder_of(model_id, kwargs))).items()}


def get_peft_config(config_dict: Mapping[str, Any]) -> LoraConfig:
    """The config of what `adapter_config.json` holds.

    Raises:
        ConfigError: it describes a method that is not here, or a field is wrong.
    """
    method = config_dict.get("peft_type")
    if method not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ConfigError(f"peft_type={method!r}: only {', '.join(map(repr, map(str, PeftType)))} are here")
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)](**config_dict)


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base's own tensors under its own names."""
    return _handle_of(model).base_state()


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
    """Load a checkpoint of the base under its own names; returns PEFT's pair of missing and unexpected keys.

    Raises:
        ModelError: with `strict`, keys are missing or unexpected; nothing is changed.
        MergedError: adapters are folded into the base's weights.
    """
    return write_base_state(_handle_of(model), state_dict, strict=strict)


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of each adapted layer; the model may be a `PeftModel` or one that adapters were injected into."""
    if isinstance(model, PeftModel):
        return model.get_layer_status()
    handle = _handle_of(model)
    return layer_status(handle, handle.active, enabled=bool(handle.active))


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of all adapted layers together."""
    if isinstance(model, PeftModel):
        return model.get_model_status()
    trainable, total = _handle_of(model).count()
    of_transformers = any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)
    return model_status(
        get_layer_status(model),
        base_model_type=type(model).__name__ if of_transformers else "other",
        adapter_model_type="None",
        peft_types={},
        trainable_params=trainable,
        total_params=total,
    )


def _handle_of(model: nn.Module) -> Adapters:
    return adapters(model.get_base_model() if isinstance(model, PeftModel) else model)
