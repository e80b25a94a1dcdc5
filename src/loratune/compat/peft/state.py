"""An adapter's tensors under the names of PEFT's files, and its base's, read from a handle and written into one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from loratune.adapt import Adapters
from loratune.adapter import Factors, to_keys
from loratune.errors import AdapterFileError, AdapterStateError, MergedError, ModelError
from loratune.lora import LowRank, Rescaling


def read_state(handle: Adapters, name: str) -> dict[str, Tensor]:
    """The tensors as a file would hold them; they share the live ones' memory where these are the same."""
    return to_keys(handle.saved(name))


def live_state(handle: Adapters, name: str) -> dict[str, Tensor]:
    """The live parameters themselves."""
    saved = handle.saved(name)
    factors: dict[str, Factors] = {}
    vectors: dict[str, dict[str, Tensor]] = {}
    filed = {target.path: target.filed for target in handle.plan(name).targets}
    for path, term in handle.terms(name).items():
        if path in saved.vectors:
            own = {"l": term.l} if isinstance(term, Rescaling) else {"d": term.inner, "b": term.outer}
            vectors[path] = {name: tensor.view_as(saved.vectors[path][name]) for name, tensor in own.items()}
        elif isinstance(term, LowRank):
            kept = saved.factors[filed[path]]
            factors[filed[path]] = kept._replace(A=term.A, B=term.B, bias=term.bias, magnitude=term.magnitude)
    return to_keys(replace(saved, factors=factors, vectors=vectors, replaced=handle.replaced(name)))


def write_state(handle: Adapters, name: str, tensors: Mapping[str, Tensor], *, strict: bool = False) -> Any:
    """Copy tensors into an adapter that is there, in place, so that optimizers keep their parameters.

    Raises:
        AdapterFileError: a tensor has another shape, or with `strict` is missing or unexpected; nothing is changed.
        AdapterStateError: the adapter starts from a decomposition, and its file holds more than what trains.
    """
    if handle.config(name).decomposes:
        raise AdapterStateError(
            f"adapter {name!r} starts from {handle.config(name).init_lora_weights!r}, relative to which it is saved",
            hint="load the file as another adapter",
        )
    live = live_state(handle, name)
    missing = [key for key in live if key not in tensors]
    unexpected = [key for key in tensors if key not in live]
    problems = [
        f"{key} is {tuple(tensors[key].shape)}, expected {tuple(tensor.shape)}"
        for key, tensor in live.items()
        if key in tensors and tensors[key].shape != tensor.shape
    ]
    if strict:
        problems += [f"{key} is missing" for key in missing] + [f"{key} is unexpected" for key in unexpected]
    if problems:
        raise AdapterFileError(problems, hint=f"adapter {name!r} was made with another config")
    with torch.no_grad():
        for key, tensor in live.items():
            if key in tensors:
                tensor.copy_(tensors[key])
    return _IncompatibleKeys(missing, unexpected)


def write_base_state(handle: Adapters, tensors: Mapping[str, Tensor], *, strict: bool) -> Any:
    """Copy tensors into the base's own, in place.

    Raises:
        ModelError: with `strict`, keys are missing or unexpected; nothing is changed.
        MergedError: adapters are folded into the base's weights.
    """
    if handle.merged:
        raise MergedError("the base's weights hold adapters, which the new ones would not", hint="unmerge first")
    there = handle.base_state()
    missing = [key for key in there if key not in tensors]
    unexpected = [key for key in tensors if key not in there]
    if strict and (missing or unexpected):
        problems = [f"{key} is missing" for key in missing] + [f"{key} is unexpected" for key in unexpected]
        raise ModelError(problems, hint="strict=False loads the rest")
    handle.model.load_state_dict({key: tensors[key] for key in there if key in tensors}, strict=False)
    return _IncompatibleKeys(missing, unexpected)


def all_matched() -> Any:
    """PEFT's pair of missing and unexpected keys, both empty."""
    return _IncompatibleKeys([], [])
