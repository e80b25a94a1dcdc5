"""`record.json`: everything that is needed to explain a run and to do it again."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from loratune.adapt import Adapters, TargetPlan, by_kind
from loratune.adapter import effective_rank
from loratune.data.example import Place
from loratune.model import device_name, processor_name, total_memory

_PACKAGES = ("loratune", "accelerate", "datasets", "numpy", "safetensors", "tokenizers", "torch", "transformers")

# Settings that say where and how a run is watched or split, not what it computes.
_OUTSIDE_IDENTITY = {
    "out", "resume", "log_with", "keep", "save_every", "samples", "checks", "micro_batch_tokens", "recompute",
}  # fmt: skip


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def identity_of(settings: Mapping[str, Mapping[str, Any]], **facts: str) -> tuple[str, dict[str, Any]]:
    """A hash of what decides a run's result, and what went into it: settings, data, base and tokenizer."""
    parts: dict[str, Any] = {k: v["value"] for k, v in settings.items() if k not in _OUTSIDE_IDENTITY}
    parts = json.loads(json.dumps({**parts, **facts}, default=str))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(), parts


def adapter_facts(plan: TargetPlan) -> dict[str, Any]:
    modules = [
        {"name": name, "count": count, "in": inner, "out": outer, "r": r, "each": parameters // count, "parameters": parameters}
        for (name, inner, outer, r), (count, parameters) in by_kind(plan).items()
    ]
    return {
        "trainable": plan.trainable,
        "total": plan.total,
        "share": plan.trainable / plan.total,
        "modules": modules,
    }


def effective_ranks(lora: Adapters) -> list[dict[str, Any]]:
    return [
        {"path": path, "effective": round(effective_rank(low_rank.A, low_rank.B), 2), "r": low_rank.r}
        for path, low_rank in lora.factors().items()
    ]


def places(rows: Sequence[Place]) -> list[str]:
    return [str(place) for place in rows]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    return {
        "processor": processor_name(),
        "cores": torch.get_num_threads(),
        "memory_bytes": total_memory(device),
        "device": device_name(device) if device.type != "cpu" else "cpu",
    }
