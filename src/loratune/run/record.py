"""`record.json`: everything that is needed to explain a run and to do it again."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from loratune.adapt import Adapters, TargetPlan, by_kind, by_replaced
from loratune.adapter import effective_rank
from loratune.data.example import hash_of
from loratune.data.tasks import DATA_TASKS
from loratune.model import device_name, kernels_of, processor_name, tokenizer_hashes, total_memory
from loratune.run.prepare import Prepared
from loratune.run.setup import Setup

# Of a stack of experts, how many are looked at.
_EXPERTS = 16
_PACKAGES = ("loratune", "accelerate", "datasets", "numpy", "safetensors", "tokenizers", "torch", "transformers")

# Settings that say where and how a run is watched or split, not what it computes.
_OUTSIDE_IDENTITY = {
    "out", "resume", "log_with", "keep", "save_every", "samples", "checks", "micro_batch_tokens", "recompute",
    "shard",
}  # fmt: skip


def now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def first_record(setup: Setup, name: str) -> dict[str, Any]:
    """The record as it stands before the first step."""
    decisions = setup.decisions
    tokenizer, template = tokenizer_hashes(setup.base.tokenizer)
    settings = {key: {**entry, "value": _plain(entry["value"])} for key, entry in decisions.to_json().items()}
    identity, parts = identity_of(
        settings,
        data_sha256=setup.prepared.corpus.sha256,
        # Held-out rows may come from a file of their own, and they decide when a run stops early.
        val_sha256=hash_of(setup.prepared.split.val),
        base_fingerprint=setup.base.fingerprint,
        tokenizer_sha256=tokenizer,
        chat_template_sha256=template,
    )
    return {
        "format": 1,
        "loratune": version("loratune"),
        "name": name,
        "state": "running",
        "created": now(),
        "identity": identity,
        "identity_of": parts,
        "settings": settings,
        "base": _base_facts(setup),
        "tokenizer": {"sha256": tokenizer, "chat_template_sha256": template},
        "data": data_facts(setup.prepared),
        "task": _task_facts(setup),
        "adapter": adapter_facts(setup.targets),
        "plan": {
            "steps": decisions["max_steps"],
            "epochs": decisions["epochs"],
            "micro_batch_tokens": decisions["micro_batch_tokens"],
            "packed": decisions["pack"],
            "pack_reason": decisions.reasons["pack"],
            "recompute": decisions["recompute"] == "on",
            "processes": setup.processes.count,
            "sharded": decisions["shard"] == "on",
            "estimate": {"memory_bytes": setup.memory.total, "seconds": round(setup.seconds, 1)},
            "notes": list(setup.targets.notes),
        },
        "checks": [],
        "result": {},
        "events": [],
        "versions": versions(),
        "hardware": hardware(setup.base.device),
    }


def _base_facts(setup: Setup) -> dict[str, Any]:
    base = setup.base
    return {
        "name": base.name,
        "source": base.source,
        "revision": base.revision,
        "fingerprint": base.fingerprint,
        "parameters": setup.targets.base_parameters,
        "dtype": setup.decisions["dtype"],
        "quant": base.quant,
        "family": base.model.config.model_type,
    }


def _task_facts(setup: Setup) -> dict[str, Any]:
    """What the base was loaded as; with the adapter's files, all that is needed to load it so again."""
    head = setup.base.head
    return {
        "type": head.task,
        "labels": list(head.labels),
        "seed": head.seed,
        "unit": DATA_TASKS[head.task].unit,
        "fresh": list(setup.base.fresh),
    }


def data_facts(prepared: Prepared) -> dict[str, Any]:
    """The data as the record and `loratune data` describe it."""
    return {
        "source": prepared.corpus.source,
        "sha256": prepared.corpus.sha256,
        "shape": prepared.corpus.shape,
        "rows": len(prepared.corpus),
        "train": prepared.train.examples,
        "val": prepared.val.examples if prepared.val else 0,
        "duplicates": [[str(train), str(val)] for train, val in prepared.split.duplicates],
        "truncated": [str(place) for place in prepared.train.truncated],
        "dropped": [str(place) for place in prepared.train.dropped],
        "fit": asdict(prepared.fit),
        "taught": prepared.facts,
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def identity_of(settings: Mapping[str, Mapping[str, Any]], **facts: str) -> tuple[str, dict[str, Any]]:
    """A hash of what decides a run's result, and what went into it: settings, data, base and tokenizer."""
    parts: dict[str, Any] = {k: v["value"] for k, v in settings.items() if k not in _OUTSIDE_IDENTITY}
    parts = json.loads(json.dumps({**parts, **facts}, default=str), parse_float=_number)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(), parts


def _number(word: str) -> float:
    """Whether it was given or decided, 16.0 is 16."""
    value = float(word)
    return int(value) if value.is_integer() else value


def adapter_facts(plan: TargetPlan) -> dict[str, Any]:
    modules = [
        {"name": name, "count": n, "in": inner, "out": outer, "each": parameters // n, "parameters": parameters}
        | ({"r": what} if isinstance(what, int) else {"rescaled": what})
        for (name, inner, outer, what), (n, parameters) in by_kind(plan).items()
    ]
    return {
        "trainable": plan.trainable,
        "total": plan.total,
        "share": plan.trainable / plan.total,
        "modules": modules,
        "replaced": [{"name": name, "count": n, "parameters": p} for name, (n, p) in by_replaced(plan).items()],
    }


def effective_ranks(lora: Adapters) -> list[dict[str, Any]]:
    """Of each update; of a stack the mean of some experts'."""
    found = []
    for path, low_rank in lora.factors().items():
        parts = low_rank.parts()
        each = [effective_rank(A, B) for A, B in parts[:: -(-len(parts) // _EXPERTS)]]
        found.append({"path": path, "effective": round(sum(each) / len(each), 2), "r": len(parts[0][0])})
    return found


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
        "kernels": kernels_of(device).named,
    }


# What of a record tells under which conditions its run is computed: other ones may give other bits.
CONDITIONS = ("versions", "hardware", "plan")


def changed_conditions(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, before, after) of what differs in machine, number of processes and versions of packages."""
    return _changed(_machine(before), _machine(after)) + changed_versions(before, after)


def changed_versions(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return _changed(before["versions"], after["versions"])


def _machine(record: Mapping[str, Any]) -> dict[str, Any]:
    # Over how many processes a run goes orders its sums.
    spread = {name: record["plan"].get(name) for name in ("processes", "sharded")}
    return {**record["hardware"], "memory_bytes": None, **spread}


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    names = sorted({*old, *new})
    return [(name, old.get(name, "none"), new.get(name, "none")) for name in names if old.get(name) != new.get(name)]
