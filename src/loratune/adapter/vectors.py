"""VeRA and (IA)³ under the names of peft 0.21.2's files, and as low-rank factors where they are such."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from loratune.adapter.value import DTYPES, Factors, SavedAdapter
from loratune.config import LoraConfig
from loratune.config.methods import CALLED, IA3, VERA
from loratune.errors import AdapterFileError
from loratune.lora import random_projections

_PREFIX = "base_model.model."
# What trains at a module, by its name here.
_SUFFIXES: dict[str, dict[str, str]] = {VERA: {"d": ".vera_lambda_d", "b": ".vera_lambda_b"}, IA3: {"l": ".ia3_l"}}
_PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")


def keys_of_vectors(adapter: SavedAdapter) -> dict[str, Tensor]:
    """The adapter's vectors and projections under the names of the file."""
    suffixes = _SUFFIXES.get(adapter.config.peft_type, {})
    found = {
        f"{_PREFIX}{path}{suffixes[name]}": tensor
        for path, vectors in adapter.vectors.items()
        for name, tensor in vectors.items()
    }
    return found | dict(zip(_PROJECTIONS, adapter.projections or (), strict=False))


class Read(NamedTuple):
    """Of a file: vectors by module path and name, VeRA's projections, and the tensors that are neither."""

    vectors: dict[str, dict[str, Tensor]]
    projections: tuple[Tensor, Tensor] | None
    others: dict[str, Tensor]


def read_vectors(tensors: Mapping[str, Tensor], method: str, *, projected: bool, problems: list[str]) -> Read:
    """The vectors of an adapter of a method that has some.

    Args:
        projected: whether the file should hold VeRA's projections.
        problems: gets a sentence for each tensor that is missing or misshaped.
    """
    vectors: dict[str, dict[str, Tensor]] = {}
    others = dict(tensors)
    for key in sorted(tensors):
        name, suffix = next(((n, end) for n, end in _SUFFIXES[method].items() if key.endswith(end)), ("", ""))
        if not name or not key.startswith(_PREFIX):
            continue
        vectors.setdefault(key[len(_PREFIX) : -len(suffix)], {})[name] = others.pop(key)
        shape = tuple(tensors[key].shape)
        if tensors[key].dtype not in DTYPES:
            problems.append(f"{key!r} is {tensors[key].dtype}, not fp32, fp64, bf16 or fp16")
        elif (
            (name == "l") == (len(shape) < 2)
            or tensors[key].numel() != max(shape, default=0)
            or not tensors[key].numel()
        ):
            problems.append(f"{key!r} is {shape}, not a vector")
    for path, found in vectors.items():
        missing = [end for name, end in _SUFFIXES[method].items() if name not in found]
        problems += [f"{path}{end} is missing" for end in missing]
    vectors = {
        path: {name: found[name] for name in _SUFFIXES[method] if name in found} for path, found in vectors.items()
    }
    return Read(vectors, _projections(others, vectors, projected, problems) if method == VERA else None, others)


def _projections(
    others: dict[str, Tensor], vectors: Mapping[str, Mapping[str, Tensor]], projected: bool, problems: list[str]
) -> tuple[Tensor, Tensor] | None:
    """VeRA's A and B, which all of its layers fit into; taken out of `others`."""
    there = [others.pop(key) for key in _PROJECTIONS if key in others]
    if not projected:  # the seed says what they are
        return None
    if len(there) < 2:
        problems.append(f"{' and '.join(_PROJECTIONS)}: not both are there, and the config says save_projection=True")
        return None
    A, B = there
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or not {A.dtype, B.dtype} <= set(DTYPES):
        problems.append(f"the projections {tuple(A.shape)} and {tuple(B.shape)} do not share a rank")
        return None
    for path, found in vectors.items():
        if "d" in found and len(found["d"].flatten()) != len(A):
            problems.append(f"{path}: d {tuple(found['d'].shape)} does not fit the projections' rank {len(A)}")
        if "b" in found and len(found["b"].flatten()) > len(B):
            problems.append(f"{path}: b {tuple(found['b'].shape)} does not fit into B {tuple(B.shape)}")
    return A, B


def as_lora(adapter: SavedAdapter, widths: Mapping[str, int]) -> SavedAdapter:
    """VeRA's update as low-rank factors, diag(d) A and diag(b) B, rounded once: what readers of LoRA take.

    Args:
        widths: how many inputs each of its modules has, which its file does not say.

    Raises:
        AdapterFileError: an adapter of another method.
    """
    config = adapter.config
    if config.peft_type != VERA:
        raise AdapterFileError(
            f"{CALLED[config.peft_type]} has no A and B", hint="`loratune merge` it into its base, and use that"
        )
    A, B = adapter.projections or random_projections(
        config.r,
        max(widths[path] for path in adapter.vectors),
        max(len(vectors["b"]) for vectors in adapter.vectors.values()),
        config.projection_prng_key,
    )
    factors = {}
    for path, vectors in adapter.vectors.items():
        d, b = vectors["d"], vectors["b"]
        inner = d.double()[:, None] * A[:, : widths[path]].double()
        outer = b.double()[:, None] * B[: len(b)].double()
        factors[path] = Factors(inner.to(d.dtype), outer.to(b.dtype))
    plain = LoraConfig(
        r=config.r,
        lora_alpha=config.r,
        target_modules=tuple(sorted(factors)),
        bias=config.bias,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
    )
    return replace(adapter, config=plain, factors=factors, vectors={}, projections=None, unknown={})
