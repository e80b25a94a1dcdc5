"""One adapter as files in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

The layout is that of peft 0.21.2. Tensors never travel as pickle, keys do not hold the adapter's name, and what is
written depends on the adapter alone: same adapter, same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from loratune.config import LoraConfig
from loratune.config.peft_keys import DESCRIPTIVE, FORMAT_VERSION, NEUTRAL
from loratune.errors import AdapterFileError, ConfigError
from loratune.files import recover, to_json, write_together

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"

_PREFIX = "base_model.model."
# Where peft's default differs from ours; a file need not hold more than its `peft_type`.
_PEFT_DEFAULTS = {"lora_alpha": 8}
_SUFFIXES = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as a value.

    Attributes:
        factors: module path → (A (r, in), B (out, r)).
        base: the name or path of the base it was trained on, where known.
        unknown: keys of a foreign `adapter_config.json` that mean nothing here; kept when written again.
    """

    config: LoraConfig
    factors: Mapping[str, tuple[Tensor, Tensor]]
    base: str | None = None
    revision: str | None = None
    unknown: Mapping[str, Any] = field(default_factory=dict)


def write_adapter(folder: Path, adapter: SavedAdapter, *, card: str, beside: Mapping[str, bytes] | None = None) -> None:
    """Write the adapter's files, all or none; `beside` holds further files that belong to it (a tokenizer's).

    Raises:
        AdapterFileError: a tensor is not finite.
    """
    bad = [path for path, factors in adapter.factors.items() if not all(bool(t.isfinite().all()) for t in factors)]
    if bad:
        raise AdapterFileError(
            [f"{path}: the adapter holds NaN or infinity" for path in bad], hint="nothing was written"
        )
    contents = {
        TENSOR_FILE: _tensor_bytes(adapter.factors),
        CARD_FILE: card.encode(),
        **(beside or {}),
        CONFIG_FILE: to_json(config_to_json(adapter)),
    }
    write_together(folder, contents)


def read_adapter(folder: Path) -> SavedAdapter:
    """Read and check an adapter's files; whether they fit a model is for the caller to see.

    Raises:
        AdapterFileError: files missing, damaged or of another kind; every problem is listed.
    """
    recover(folder)
    if not folder.is_dir():
        raise AdapterFileError(f"{folder}: no such folder")
    if not (folder / TENSOR_FILE).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise AdapterFileError(
                f"{folder / 'adapter_model.bin'} is a pickle, which can run code when it is read",
                hint=f"convert it to {TENSOR_FILE} with the tool that wrote it",
            )
        raise AdapterFileError(f"{folder} holds no adapter: {TENSOR_FILE} is missing")
    raw = _read_config(folder / CONFIG_FILE)
    config, unknown = config_from_json(raw, str(folder / CONFIG_FILE))
    return SavedAdapter(
        config, _read_factors(folder / TENSOR_FILE), raw.get("base_model_name_or_path"), raw.get("revision"), unknown
    )


def config_to_json(adapter: SavedAdapter) -> dict[str, Any]:
    """The content of `adapter_config.json`: every key that peft 0.21.2 writes, in inference mode."""
    values: dict[str, Any] = {**NEUTRAL, **adapter.config.model_dump(mode="json"), **adapter.unknown}
    alpha = adapter.config.lora_alpha
    # peft declares alpha as a whole number; vLLM's and llama.cpp's readers take it as written.
    values["lora_alpha"] = int(alpha) if alpha == int(alpha) else alpha
    for key in ("target_modules", "exclude_modules"):
        if isinstance(values[key], list):
            values[key] = sorted(values[key])
    values.update(
        peft_type="LORA",
        peft_version=FORMAT_VERSION,
        inference_mode=True,
        auto_mapping=None,
        base_model_name_or_path=adapter.base,
        revision=adapter.revision,
    )
    return values


def config_from_json(raw: Mapping[str, Any], where: str) -> tuple[LoraConfig, dict[str, Any]]:
    """The adapter's settings and the keys that are unknown here.

    Raises:
        AdapterFileError: not a LoRA, or a key asks for what is not implemented.
    """
    if raw.get("peft_type") != "LORA":
        raise AdapterFileError(f"{where}: peft_type is {raw.get('peft_type')!r}, only 'LORA' can be read")
    known = {*LoraConfig.names(), *NEUTRAL, *DESCRIPTIVE}
    unknown = {key: value for key, value in raw.items() if key not in known}
    values = {key: value for key, value in raw.items() if key in known}
    try:
        return LoraConfig(**{**_PEFT_DEFAULTS, **values}), unknown
    except ConfigError as error:
        raise AdapterFileError([f"{where}: {problem}" for problem in error.problems]) from None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterFileError(f"{path} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterFileError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise AdapterFileError(f"{path} holds no JSON object")
    return raw


def _tensor_bytes(factors: Mapping[str, tuple[Tensor, Tensor]]) -> bytes:
    tensors = {}
    for path, pair in factors.items():
        for suffix, tensor in zip(_SUFFIXES, pair, strict=True):
            tensors[_PREFIX + path + suffix] = tensor.detach().cpu().contiguous().clone()
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


def _read_factors(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(f"{path} is damaged or not a safetensors file: {error}") from None
    problems: list[str] = []
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)
        if suffix is None or not key.startswith(_PREFIX):
            problems.append(f"{path}: unexpected tensor {key!r}")
            continue
        if tensor.ndim != 2 or not torch.is_floating_point(tensor):
            problems.append(f"{path}: {key!r} is {tuple(tensor.shape)} {tensor.dtype}, not a floating-point matrix")
        elif not bool(tensor.isfinite().all()):
            problems.append(f"{path}: {key!r} holds NaN or infinity")
        pairs.setdefault(key[len(_PREFIX) : -len(suffix)], {})[suffix] = tensor
    for module, pair in pairs.items():
        missing = [suffix for suffix in _SUFFIXES if suffix not in pair]
        if missing:
            problems.append(f"{path}: {module}{missing[0]} is missing")
        elif not problems and pair[_SUFFIXES[0]].shape[0] != pair[_SUFFIXES[1]].shape[1]:
            a, b = (tuple(pair[suffix].shape) for suffix in _SUFFIXES)
            problems.append(f"{path}: {module}: A {a} and B {b} do not share a rank")
    if not tensors:
        problems.append(f"{path} holds no tensors")
    if problems:
        raise AdapterFileError(problems)
    return {module: (pair[_SUFFIXES[0]], pair[_SUFFIXES[1]]) for module, pair in sorted(pairs.items())}
