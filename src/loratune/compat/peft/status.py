"""What `get_layer_status` and `get_model_status` of PEFT say, from the handle.

One adapter set is active in the whole model here, so nothing is "irregular" but what one layer has and another lacks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from loratune.adapt import Adapters, Target
from loratune.config.methods import IA3, LORA, VERA
from loratune.errors import AdapterStateError
from loratune.lora import base_modules

Irregular = Literal["irregular"]

# PEFT adapts GPT-2's Conv1D by its layer for Linear.
_LAYERS = {"Conv1D": "Linear"}
# What PEFT puts before the name of a method's layers.
_PREFIXES: dict[str, str] = {LORA: "lora.", VERA: "vera.", IA3: ""}


@dataclass
class TunerLayerStatus:
    """One adapted layer, or one module of `modules_to_save`; the fields are PEFT's.

    Attributes:
        active_adapters: also those that have nothing on this layer, as in PEFT.
        requires_grad: by adapter; True also while the adapters are disabled, which freezes nothing here.
        devices: by adapter, the kinds of device its tensors are on.
        quantization_backend: None, since no quantised layer is adapted.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """All layers together; the fields are PEFT's. What differs from layer to layer is "irregular"."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def layer_status(handle: Adapters, active: Sequence[str], *, enabled: bool, under: str = "") -> list[TunerLayerStatus]:
    """One for each adapted layer and each module that trains whole, in the model's order.

    Args:
        active: the adapters that are active, or will be again where they are disabled.
        under: what stands before a module's path in its name.

    Raises:
        AdapterStateError: no adapter is left on the model.
    """
    kinds = {target.path: target for name in handle.names for target in handle.plan(name).targets}
    saved = {path for name in handle.names for path in handle.plan(name).saved}
    # In the model's order; of a module's parameters the last first, as PEFT wraps them.
    filed = {target.path: target.filed for name in handle.names for target in handle.plan(name).stacks}
    paths = [each for path, _ in base_modules(handle.model) for each in (path, *_on(path, filed))]
    found = []
    for path in paths:
        tensors = _tensors(handle, path, whole=path in saved) if path in kinds or path in saved else {}
        if tensors:
            found.append(
                TunerLayerStatus(
                    name=under + filed.get(path, path),
                    module_type=_type(path, kinds, saved, filed),
                    enabled=enabled,
                    active_adapters=[name for name in active if path not in saved or name in tensors],
                    merged_adapters=[name for name in active if handle.merged and name in tensors],
                    requires_grad={name: _all_or_none(p.requires_grad for p in own) for name, own in tensors.items()},
                    available_adapters=sorted(tensors),
                    devices={name: sorted({p.device.type for p in own}) for name, own in tensors.items()},
                    quantization_backend=None,
                )
            )
    if not found:
        raise AdapterStateError("this model has no adapter left", hint="add or load one")
    return found


def model_status(layers: Sequence[TunerLayerStatus], **about: Any) -> TunerModelStatus:
    """The layers' status as one.

    Args:
        about: the fields that no layer tells: the types and the counts of parameters.
    """
    names = sorted({name for layer in layers for name in layer.available_adapters})
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    partly = any(name in layer.available_adapters and name not in layer.merged_adapters
                 for layer in layers for name in merged)  # fmt: skip
    active = {tuple(layer.active_adapters) for layer in layers}
    return TunerModelStatus(
        **about,
        num_adapter_layers=len(layers),
        enabled=all(layer.enabled for layer in layers),
        active_adapters=list(active.pop()) if len(active) == 1 else "irregular",
        merged_adapters="irregular" if partly else merged,
        requires_grad={
            name: _all_or_none(layer.requires_grad[name] for layer in layers if name in layer.requires_grad)
            for name in names
        },
        available_adapters=names,
        devices={
            name: sorted({device for layer in layers for device in layer.devices.get(name, ())}) for name in names
        },
        quantization_backend=None,
    )


def _on(path: str, filed: Mapping[str, str]) -> list[str]:
    """The adapted parameters of one module."""
    return sorted((full for full in filed if full.rpartition(".")[0] == path), key=filed.__getitem__)


def _type(path: str, kinds: Mapping[str, Target], saved: Collection[str], filed: Collection[str]) -> str:
    if path in saved:
        return "ModulesToSaveWrapper"
    if path in filed:
        return "lora.ParamWrapper"
    target = kinds[path]
    return _PREFIXES[target.method] + _LAYERS.get(target.kind, target.kind)


def _tensors(handle: Adapters, path: str, *, whole: bool) -> dict[str, list[nn.Parameter]]:
    """By adapter, the tensors that it has on one module; of one that trains whole also those inside it."""
    found: dict[str, list[nn.Parameter]] = {}
    for name in handle.names:
        if whole:
            own = [p for full, p in handle.replaced(name).items() if full.startswith(path + ".")]
        else:
            term = handle.terms(name).get(path)
            own = [] if term is None else list(term.parameters())
        if own:
            found[name] = own
    return found


def _all_or_none(values: Iterable[bool | Irregular]) -> bool | Irregular:
    found = set(values)
    return found.pop() if len(found) == 1 else "irregular"
