"""One adapter as files in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

The layout is that of peft 0.21.2. Tensors never travel as pickle, keys do not hold the adapter's name, and what is
written depends on the adapter alone: same adapter, same bytes. `loratune.json` beside them holds what PEFT's files
have no place for, the hashes of base and tokenizer; other readers ignore it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, get_args

import safetensors
import safetensors.torch
from torch import Tensor

from loratune.adapter.card import about_of
from loratune.adapter.keys import copied_tables, from_keys, name_in_base, surplus_keys, to_keys
from loratune.adapter.stacks import with_stacks
from loratune.adapter.value import DTYPES, Factors, Origin, SavedAdapter
from loratune.adapter.vectors import Read, read_vectors
from loratune.config import NO_TARGETS, LoraConfig
from loratune.config.methods import LORA, Method, from_file, to_file
from loratune.config.peft_keys import DESCRIPTIVE, FORMAT_VERSION, NEUTRAL
from loratune.config.tasks import HEADS_OF_TASK
from loratune.errors import AdapterFileError, ConfigError, Refusals
from loratune.files import finish, to_json, write_together

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
ORIGIN_FILE = "loratune.json"

# Where peft's default differs from ours; a file need not hold more than its `peft_type`.
_PEFT_DEFAULTS = {"lora_alpha": 8}


def write_adapter(folder: Path, adapter: SavedAdapter, *, card: str, beside: Mapping[str, bytes] | None = None) -> None:
    """Write the adapter's files, all or none; `beside` holds further files that belong to it (a tokenizer's).

    Raises:
        AdapterFileError: a tensor is not finite, or on the meta device.
    """
    bad = [f"{name} {why}" for name, tensor in adapter.named_tensors() if (why := _unfit(tensor))]
    if bad:
        raise AdapterFileError(bad, hint="nothing was written")
    contents = {TENSOR_FILE: _tensor_bytes(adapter), CARD_FILE: card.encode(errors="replace"), **(beside or {})}
    # Also where nothing is known: one that another adapter left in the folder would speak for this one.
    contents[ORIGIN_FILE] = to_json({"format": 1, **asdict(adapter.origin)})
    contents[CONFIG_FILE] = to_json(config_to_json(adapter))
    if folder.exists() and not folder.is_dir():
        raise AdapterFileError(f"{folder} is a file", hint="name a folder; nothing was written")
    write_together(folder, contents)


def read_adapter(folder: Path, *, finite: bool = True) -> SavedAdapter:
    """Read and check an adapter's files; whether they fit a model is for the caller to see.

    Args:
        finite: refuse NaN and infinity; without it they are read as they are, to be looked at.

    Raises:
        AdapterFileError: files missing, damaged or of another kind; every problem is listed.
    """
    _refuse_no_adapter(folder)
    refusals = Refusals()
    described = refusals.attempt(lambda: read_config(folder))
    # Where the config is damaged, tensors are looked at all the same: all of it is to be said at once.
    config = described.config if described else None
    contents = refusals.attempt(lambda: _read_contents(folder / TENSOR_FILE, config, finite))
    origin = refusals.attempt(lambda: _read_origin(folder / ORIGIN_FILE))
    refusals.check()
    assert described is not None
    assert contents is not None
    assert origin is not None
    factors, replaced, surplus, copies, vectors, projections = contents
    config, base, revision, unknown = described
    about = _read_about(folder / CARD_FILE)
    return SavedAdapter(
        config, factors, replaced, base, revision, origin, unknown, surplus, about, copies, vectors, projections
    )  # fmt: skip


class _Contents(NamedTuple):
    """Of a tensor file: factors, tensors in place of the base's, keys that mean nothing, copies of the base's, and what
    other methods have instead of factors.
    """

    factors: dict[str, Factors]
    replaced: dict[str, Tensor]
    surplus: tuple[str, ...]
    copies: dict[str, Tensor]
    vectors: dict[str, dict[str, Tensor]]
    projections: tuple[Tensor, Tensor] | None


def _read_contents(path: Path, config: LoraConfig | None, finite: bool) -> _Contents:
    tensors = _read_tensors(path)
    problems = [f"{key!r} holds NaN or infinity" for key, t in tensors.items() if finite and not _finite(t)]
    whole = config is None or (
        config.bias != "none" or bool(config.modules_to_save) or config.task_type in HEADS_OF_TASK
    )
    replaces = whole or (config is not None and config.trainable_token_indices is not None)
    copies = copied_tables(tensors, replaces=whole)
    surplus = (*copies, *surplus_keys(tensors))
    tensors = {key: tensor for key, tensor in tensors.items() if key not in surplus}
    read = Read({}, None, tensors)
    if config is not None and config.peft_type != LORA:
        read = read_vectors(tensors, config.peft_type, projected=config.save_projection, problems=problems)
    factors, replaced = from_keys(read.others, replaces=replaces, problems=problems)
    if factors and config is not None and config.peft_type != LORA:
        problems.append(f"{next(iter(factors))} has low-rank tensors, and peft_type is {config.peft_type!r}")
    expected = config is None or config.target_modules != NO_TARGETS or bool(config.target_parameters)
    factors = factors if config is None else with_stacks(factors, config)
    if not factors and not read.vectors and not problems and (expected or not replaced):
        problems.append(f"it holds no {'low-rank ' if expected else ''}tensors")
    if problems:
        hint = "the file is damaged, or holds another kind of adapter"
        raise AdapterFileError([f"{path}: {problem}" for problem in problems], hint=hint)
    of_base = {name_in_base(key): tensor for key, tensor in copies.items()}
    return _Contents(factors, replaced, surplus, of_base, read.vectors, read.projections)


class Described(NamedTuple):
    """What `adapter_config.json` says: settings, the base's name and revision, and keys that mean nothing here."""

    config: LoraConfig
    base: str | None
    revision: str | None
    unknown: dict[str, Any]


def read_config(folder: Path) -> Described:
    """Read the settings of an adapter whose tensors are there too.

    Raises:
        AdapterFileError: files missing, damaged or of another kind; every problem is listed.
    """
    _refuse_no_adapter(folder)
    raw = _read_json(folder / CONFIG_FILE)
    config, unknown = config_from_json(raw, str(folder / CONFIG_FILE))
    base, revision = (_text(raw, key, folder / CONFIG_FILE) for key in ("base_model_name_or_path", "revision"))
    return Described(config, base, revision, unknown)


def _refuse_no_adapter(folder: Path) -> None:
    try:
        finish(folder)
    except OSError as error:
        raise AdapterFileError(f"{folder}: an interrupted write cannot be finished: {error}") from None
    if not folder.is_dir():
        raise AdapterFileError(f"{folder}: no such folder", hint="an adapter is a folder or a hub id like owner/name")
    if not (folder / TENSOR_FILE).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise AdapterFileError(
                f"{folder / 'adapter_model.bin'} is a pickle, which can run code when it is read",
                hint=f"convert it to {TENSOR_FILE} with the tool that wrote it",
            )
        raise AdapterFileError(
            f"{folder} holds no adapter: {TENSOR_FILE} is missing", hint="name the folder that `save` or a run wrote"
        )


def config_to_json(adapter: SavedAdapter) -> dict[str, Any]:
    """The content of `adapter_config.json`: every key that peft 0.21.2 writes for its method, in inference mode."""
    method = adapter.config.peft_type
    values = to_file(method, adapter.config.model_dump(mode="json"))
    if method == LORA:
        values = {**NEUTRAL, **values}
        if adapter.config.init_lora_weights == "swapped":
            values["init_lora_weights"] = True  # peft has no such start, and a reader never starts it
        # peft declares alpha as a whole number; vLLM's and llama.cpp's readers take it as written.
        alpha = adapter.config.lora_alpha
        values["lora_alpha"] = int(alpha) if alpha == int(alpha) else alpha
    values |= adapter.unknown
    for key in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "feedforward_modules"):
        if isinstance(values.get(key), list):
            values[key] = sorted(values[key])
    values.update(
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
        AdapterFileError: a method that is not implemented, or a key asks for what is not.
    """
    method = raw.get("peft_type")
    if method not in get_args(Method):
        listed = ", ".join(map(repr, get_args(Method)))
        raise AdapterFileError(f"{where}: peft_type is {method!r}, only {listed} can be read")
    try:
        if method != LORA:
            values, beyond = from_file(raw)
            return LoraConfig(**values), {key: value for key, value in beyond.items() if key not in DESCRIPTIVE}
        known = {*to_file(LORA, dict.fromkeys(LoraConfig.names())), *NEUTRAL, *DESCRIPTIVE}
        unknown = {key: value for key, value in raw.items() if key not in known}
        values = {key: value for key, value in raw.items() if key in known}
        return LoraConfig(**{**_PEFT_DEFAULTS, **values}), unknown
    except ConfigError as error:
        raise AdapterFileError([f"{where}: {problem}" for problem in error.problems]) from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise AdapterFileError(f"{path} is missing" if not path.exists() else f"{path} is no file")
    try:
        raw = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=_no_number, object_pairs_hook=_without_repeats
        )
        # Half of a surrogate pair can be written in JSON and in no file of ours.
        json.dumps(raw, ensure_ascii=False).encode()
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise AdapterFileError(f"{path} holds no JSON object")
    return raw


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no JSON number")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, unless a key comes twice: which of the values holds is then anybody's guess."""
    repeated = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
    if repeated:
        raise ValueError(f"{repeated[0]!r} comes more than once")
    return dict(pairs)


def _read_origin(path: Path) -> Origin:
    if not path.is_file():
        return Origin()
    raw = _read_json(path)
    if raw.get("format") != 1:
        raise AdapterFileError(f"{path}: format {raw.get('format')!r} is not known here", hint="upgrade loratune")
    return Origin(*(_text(raw, key, path) for key in Origin.__dataclass_fields__))


def _read_about(path: Path) -> str:
    """What the card says about the adapter; a card that cannot be read keeps nobody from using the adapter."""
    try:
        return about_of(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""


def _text(raw: Mapping[str, Any], key: str, path: Path) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise AdapterFileError(f"{path}: {key}={value!r} is no text")
    return value


def _tensor_bytes(adapter: SavedAdapter) -> bytes:
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in to_keys(adapter).items()}
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(path.read_bytes())
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(f"{path} is damaged or not a safetensors file: {error}") from None


def count_parameters(folder: Path) -> int:
    """How many numbers an adapter's file holds, by its header alone.

    Raises:
        AdapterFileError: no such file, or a damaged one.
    """
    path = folder / TENSOR_FILE
    try:
        with safetensors.safe_open(path, "pt") as file:
            return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(f"{path} is damaged or not a safetensors file: {error}") from None


def _unfit(tensor: Tensor) -> str:
    """Why a tensor cannot be written; empty where it can."""
    if tensor.is_meta:
        return "is on the meta device and holds no values"
    return "" if _finite(tensor) else "holds NaN or infinity"


def _finite(tensor: Tensor) -> bool:
    return tensor.dtype not in DTYPES or bool(tensor.isfinite().all())
