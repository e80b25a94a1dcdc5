"""Names of tensors in `adapter_model.safetensors`, as peft 0.21.2 writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loratune.adapter.value import DTYPES, Factors, SavedAdapter
from loratune.adapter.vectors import keys_of_vectors

# Under a table's path: the rows of its that an adapter has its own of.
_EXCHANGED = "token_adapter"
TOKEN_ROWS = f"{_EXCHANGED}.trainable_tokens_delta"

_PREFIX = "base_model.model."
# The module that an adapted one is wrapped around in peft; the names of its own tensors go through it.
_WRAPPED = "base_layer."
_SUFFIXES = {
    "A": ".lora_A.weight",
    "B": ".lora_B.weight",
    "bias": ".lora_B.bias",
    "magnitude": ".lora_magnitude_vector",
}
# Of an embedding, where they are no weights of modules.
_EMBEDDED_A = ".lora_embedding_A"
_LOOKED_UP = {"A": _EMBEDDED_A, "B": ".lora_embedding_B"}


def to_keys(adapter: SavedAdapter) -> dict[str, Tensor]:
    """The adapter's tensors under the names of the file."""
    tensors = {
        _PREFIX + path + _suffixes(factors.looked_up)[name]: _as_written(name, tensor, factors)
        for path, factors in adapter.factors.items()
        for name, tensor in factors.tensors()
    } | keys_of_vectors(adapter)
    for full, tensor in adapter.replaced.items():
        path, _, name = full.rpartition(".")
        key = f"{path}.{_WRAPPED}{name}" if path in adapter.modules else full
        tensors[_PREFIX + key] = tensor
    return tensors


def _suffixes(looked_up: bool) -> Mapping[str, str]:
    return _SUFFIXES | _LOOKED_UP if looked_up else _SUFFIXES


def _as_written(name: str, tensor: Tensor, factors: Factors) -> Tensor:
    """peft holds a convolution's magnitude as it is multiplied with an output: (1, out, 1, ...)."""
    points = factors.A.ndim - 2
    return tensor.view(1, -1, *(1,) * points) if name == "magnitude" and points else tensor


def surplus_keys(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Keys that peft writes beside those that count, and that mean nothing.

    With bias="all" the biases inside peft's wrappers: those of the base, and once more those that count. Of a tied head
    the rows of tokens, once more than those of the embedding.
    """
    return tuple(key for key, tensor in tensors.items() if _is_surplus(key, tensor, tensors))


def copied_tables(tensors: Mapping[str, Tensor], *, replaces: bool) -> dict[str, Tensor]:
    """Keys of whole embeddings and heads of the base that peft writes beside an adapter, with what they hold.

    It does where one is targeted, or where the vocabulary was resized, unless told otherwise.

    Args:
        replaces: whether such a tensor may also be the adapter's own; without it those of resized ones are copies.
    """
    found = {}
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        wrapped = path.removesuffix("." + _WRAPPED.rstrip("."))
        adapted = any(wrapped + end in tensors for end in _BESIDE)
        if name == "weight" and tensor.ndim == 2 and key.startswith(_PREFIX) and not key.endswith(_FACTOR_ENDS):
            of_resized = not replaces and path.rpartition(".")[2] in _TABLES
            if (wrapped != path and adapted) or of_resized:
                found[key] = tensor
    return found


def name_in_base(key: str) -> str:
    """The name that the base has for a tensor of the file."""
    wrapped = key.removeprefix(_PREFIX).replace(f".{_WRAPPED}", ".")
    return wrapped if wrapped.endswith(TOKEN_ROWS) else wrapped.replace(f".{_EXCHANGED}.", ".")


def _is_surplus(key: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> bool:
    if key.endswith(f"lm_head.{TOKEN_ROWS}"):  # of a tied head, which has those of the embedding
        others = [other for name, other in tensors.items() if name.endswith(TOKEN_ROWS) and name != key]
        return any(torch.equal(tensor, other) for other in others)
    if ".original_module." in key:
        return key.replace(".original_module.", ".") in tensors
    twin = tensors.get(key.replace(".modules_to_save.", "."))
    return ".modules_to_save." in key and twin is not None and torch.equal(twin, tensor)


def from_keys(
    tensors: Mapping[str, Tensor], *, replaces: bool, problems: list[str]
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Factors by module path, and tensors that stand in the place of the base's, both sorted by name.

    Args:
        replaces: whether the adapter may hold such tensors; without it they are unexpected.
        problems: gets a sentence for each tensor that is unexpected, misshaped or missing.
    """
    roles: dict[tuple[str, bool], dict[str, Any]] = {}
    replaced: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        role, suffix = next(((role, end) for role, end in _ENDS if key.endswith(end)), (None, ""))
        if not key.startswith(_PREFIX) or (role is None and not replaces):
            problems.append(f"unexpected tensor {key!r}")
        elif tensor.dtype not in DTYPES:
            problems.append(f"{key!r} is {tensor.dtype}, not fp32, fp64, bf16 or fp16")
        elif role is None:
            full = name_in_base(key)
            if full in replaced:
                problems.append(f"{key!r}: there are two tensors for {full}")
            replaced[full] = tensor
        elif not _has_shape(role, suffix, tensor):
            problems.append(f"{key!r} is {tuple(tensor.shape)}, not a {'matrix' if role in 'AB' else 'vector'}")
        else:
            path = key[len(_PREFIX) : -len(suffix)]
            looked_up = suffix in _LOOKED_UP.values() or (
                role == "magnitude" and _PREFIX + path + _EMBEDDED_A in tensors
            )
            roles.setdefault((path, looked_up), {})[role] = tensor if role in "AB" else tensor.flatten()
    factors: dict[str, Factors] = {}
    for (path, looked_up), found in sorted(roles.items()):
        suffixes = _suffixes(looked_up)
        missing = [path + suffixes[role] for role in "AB" if role not in found]
        if path in factors:
            problems.append(f"{path}: it has tensors of an embedding and of another layer")
        if missing:
            problems += [f"{name} is missing" for name in missing if _PREFIX + name not in tensors]
            continue
        factors[path] = Factors(**found, looked_up=looked_up)
        _check_shapes(path, factors[path], problems)
    return factors, dict(sorted(replaced.items()))


# Each tensor's end of a key with its role.
_ENDS = (*_SUFFIXES.items(), *_LOOKED_UP.items())
# What stands beside the copy of a table in peft's wrapper around it.
_BESIDE = (_SUFFIXES["A"], _EMBEDDED_A, TOKEN_ROWS.removeprefix(_EXCHANGED))
_FACTOR_ENDS = tuple(end for _, end in _ENDS)
# What embeddings and heads are called in the models that people resize.
_TABLES = ("embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out")


def _has_shape(role: str, suffix: str, tensor: Tensor) -> bool:
    """Whether it has the dimensions of a matrix or a vector, or of a convolution's."""
    if role in "AB":
        return tensor.ndim == 2 or (2 < tensor.ndim < 6 and suffix not in _LOOKED_UP.values())
    is_row = role == "magnitude" and tensor.ndim > 2 and tensor.numel() == tensor.shape[1]
    return tensor.ndim == 1 or is_row


def _check_shapes(path: str, factors: Factors, problems: list[str]) -> None:
    a, b = tuple(factors.A.shape), tuple(factors.B.shape)
    whole = len(a) == len(b) and b[2:] == (1,) * (len(b) - 2)
    shared = a[0] == b[1] if len(a) == 2 else b[1] > 0 and a[0] % b[1] == 0 and b[0] % (a[0] // b[1]) == 0
    if not whole or not shared:
        problems.append(f"{path}: A {a} and B {b} do not share a rank")
    if a[0] == 0:
        problems.append(f"{path}: A {a} and B {b} have no rank")
    for name in ("bias", "magnitude"):
        tensor = getattr(factors, name)
        if tensor is not None and len(tensor) != b[0]:
            problems.append(f"{path}: {name} ({len(tensor)}) does not fit B {b}")
