"""`inspect` and `show`: what an adapter is and what it changed, from its files alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from loratune.adapter import Inspection, SavedAdapter, adapter_folder, config_to_json, read_adapter
from loratune.adapter import inspect as look_into
from loratune.adapter.spectrum import layer_order
from loratune.config import LoraConfig
from loratune.config.methods import CALLED, to_file
from loratune.run.folder import RunFolder


def inspect(adapter: str | Path | SavedAdapter) -> Inspection:
    """Spectrum, ranks, unused directions and damage of each module of an adapter.

    Args:
        adapter: a folder of a run or adapter, or an adapter as a value. NaN and infinity are named, no error.

    Raises:
        AdapterFileError: files missing, damaged or of another kind.
    """
    return look_into(adapter if isinstance(adapter, SavedAdapter) else _read(adapter))


def show(run: str) -> dict[str, Any]:
    """The adapter's settings and, layer by layer, the size and spectrum of its update."""
    folder = adapter_folder(run)
    saved = _read(folder)
    record = RunFolder(folder).record()
    found, config = look_into(saved), config_to_json(saved)
    settings = to_file(saved.config.peft_type, dict.fromkeys(LoraConfig.names()))
    layers = []
    for module in found.modules:
        spectrum = module.spectrum
        layers.append(
            {
                "path": module.path,
                "r": module.r,
                "in": module.inner,
                "out": module.outer,
                "scale": module.scale,
                "parameters": module.parameters,
                "beside": list(module.beside),
                "zero_components": list(module.zero_components),
                "norm": spectrum and spectrum.norm,
                "largest": spectrum and spectrum.singular_values[0],
                "effective_rank": spectrum and spectrum.effective_rank,
                "stable_rank": spectrum and spectrum.stable_rank,
                "dead": spectrum and spectrum.dead,
                "singular_values": spectrum and list(spectrum.singular_values),
            }
        )
    return {
        "path": str(folder),
        "base": saved.base,
        "config": {k: v for k, v in config.items() if k in settings and v not in (None, False, [], {})},
        "unknown_keys": sorted(saved.unknown),
        "parameters": found.parameters,
        "norm": found.norm,
        "layers": layers,
        "vectors": list(_vectors(saved)),
        "replaced": list(found.replaced),
        "non_finite": list(found.non_finite),
        "caveats": _caveats(saved),
        "record": None if record is None else {key: record.get(key) for key in ("state", "result", "measured", "data")},
    }


def _vectors(saved: SavedAdapter) -> Iterator[dict[str, Any]]:
    """Of methods that train vectors: each with its size and what its values are between."""

    def known(value: Tensor) -> float | None:
        return float(value) if value.isfinite() else None

    for path in sorted(saved.vectors, key=layer_order):
        for name, tensor in saved.vectors[path].items():
            values = tensor.float()
            yield {
                "path": path,
                "name": name,
                "size": values.numel(),
                "least": known(values.min()),
                "mean": known(values.mean()),
                "largest": known(values.max()),
            }


def _caveats(saved: SavedAdapter) -> list[str]:
    """Where scale · B A is not all that the adapter does to a weight."""
    caveats = []
    if saved.config.decomposes:
        caveats.append(
            f"it starts from {saved.config.init_lora_weights!r}: B A counts from a base that peft had changed"
        )
    if saved.vectors:
        caveats.append(f"{CALLED[saved.config.peft_type]} trains vectors, of which there is no spectrum")
    if saved.config.use_dora:
        caveats.append("DoRA: the figures are of scale · B A, before each row is brought to its length")
    return caveats


def _read(folder: str | Path) -> SavedAdapter:
    return read_adapter(adapter_folder(folder), finite=False)
