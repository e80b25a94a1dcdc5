"""Names of tensors in `adapter_model.safetensors`, as peft 0.21.2 writes them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loratune.adapter.value import Factors, SavedAdapter

# What an adapter can be computed with.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_PREFIX = "base_model.model."
# The module that an adapted one is wrapped around in peft; the names of its own tensors go through it.
_WRAPPED = "base_layer."
_SUFFIXES = {
    "A": ".lora_A.weight",
    "B": ".lora_B.weight",
    "bias": ".lora_B.bias",
    "magnitude": ".lora_magnitude_vector",
}


def to_keys(adapter: SavedAdapter) -> dict[str, Tensor]:
    """The adapter's tensors under the names of the file."""
    tensors = {
        _PREFIX + path + _SUFFIXES[name]: tensor
        for path, factors in adapter.factors.items()
        for name, tensor in factors.tensors()
    }
    for full, tensor in adapter.replaced.items():
        path, _, name = full.rpartition(".")
        key = f"{path}.{_WRAPPED}{name}" if path in adapter.factors else full
        tensors[_PREFIX + key] = tensor
    return tensors


def surplus_keys(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Keys that peft writes beside those that count, and that mean nothing.

    A copy of the weight of a targeted head or embedding, which stays the base's; and with bias="all" the biases inside
    peft's wrappers: those of the base, and once more those that count.
    """
    return tuple(key for key, tensor in tensors.items() if _is_surplus(key, tensor, tensors))


def _is_surplus(key: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> bool:
    if key.endswith(f".{_WRAPPED}weight"):
        return key.removesuffix(f".{_WRAPPED}weight") + _SUFFIXES["A"] in tensors
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
    roles: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        role = next((role for role, suffix in _SUFFIXES.items() if key.endswith(suffix)), None)
        if not key.startswith(_PREFIX) or (role is None and not replaces):
            problems.append(f"unexpected tensor {key!r}")
        elif tensor.dtype not in DTYPES:
            problems.append(f"{key!r} is {tensor.dtype}, not fp32, fp64, bf16 or fp16")
        elif role is None:
            full = key[len(_PREFIX) :].replace(f".{_WRAPPED}", ".")
            if full in replaced:
                problems.append(f"{key!r}: there are two tensors for {full}")
            replaced[full] = tensor
        elif tensor.ndim != (2 if role in "AB" else 1):
            problems.append(f"{key!r} is {tuple(tensor.shape)}, not a {'matrix' if role in 'AB' else 'vector'}")
        else:
            roles.setdefault(key[len(_PREFIX) : -len(_SUFFIXES[role])], {})[role] = tensor
    factors = {}
    for path, found in sorted(roles.items()):
        missing = [path + _SUFFIXES[role] for role in "AB" if role not in found]
        if missing:
            problems += [f"{name} is missing" for name in missing if _PREFIX + name not in tensors]
            continue
        factors[path] = Factors(**found)
        _check_shapes(path, factors[path], problems)
    return factors, dict(sorted(replaced.items()))


def _check_shapes(path: str, factors: Factors, problems: list[str]) -> None:
    a, b = tuple(factors.A.shape), tuple(factors.B.shape)
    if a[0] != b[1]:
        problems.append(f"{path}: A {a} and B {b} do not share a rank")
    if a[0] == 0:
        problems.append(f"{path}: A {a} and B {b} have no rank")
    for name in ("bias", "magnitude"):
        tensor = getattr(factors, name)
        if tensor is not None and len(tensor) != b[0]:
            problems.append(f"{path}: {name} ({len(tensor)}) does not fit B {b}")
