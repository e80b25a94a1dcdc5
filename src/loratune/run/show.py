"""`show`: what an adapter is and what it changed, from its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loratune.adapter import config_to_json, effective_rank, read_adapter, singular_values
from loratune.lora import scale_of
from loratune.run.folder import RunFolder


def show(run: str) -> dict[str, Any]:
    """The adapter's settings and, layer by layer, the size and spectrum of its update."""
    folder = Path(run).expanduser()
    saved = read_adapter(folder)
    record = RunFolder(folder).record()
    layers = []
    for path, (A, B) in sorted(saved.factors.items(), key=lambda item: _natural(item[0])):
        r = A.shape[0]
        sigma = singular_values(A, B) * scale_of(r, saved.config.lora_alpha, saved.config.use_rslora)
        layers.append(
            {
                "path": path,
                "r": r,
                "parameters": A.numel() + B.numel(),
                "norm": float(sigma.norm()),
                "largest": float(sigma[0]),
                "effective_rank": effective_rank(A, B),
            }
        )
    return {
        "path": str(folder),
        "base": saved.base,
        "config": {k: v for k, v in config_to_json(saved).items() if v not in (None, False, [], {})},
        "unknown_keys": sorted(saved.unknown),
        "parameters": sum(layer["parameters"] for layer in layers),
        "layers": layers,
        "record": None if record is None else {key: record.get(key) for key in ("state", "result", "measured", "data")},
    }


def _natural(path: str) -> list[tuple[int, str]]:
    """A key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
