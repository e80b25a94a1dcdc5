"""A made-up run folder with every part, and ways to change it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LAYERS = 30
KINDS = (
    ("q_proj", 576, 576),
    ("k_proj", 576, 192),
    ("v_proj", 576, 192),
    ("o_proj", 576, 576),
    ("gate_proj", 576, 1536),
    ("up_proj", 576, 1536),
    ("down_proj", 1536, 576),
)
STEPS = 150
R = 16


def _modules() -> list[dict[str, Any]]:
    return [
        {"name": name, "count": LAYERS, "in": inner, "out": outer, "r": R, "each": R * (inner + outer)}
        | {"parameters": LAYERS * R * (inner + outer)}
        for name, inner, outer in KINDS
    ]


def _effective_rank() -> list[dict[str, Any]]:
    found = []
    for layer in range(LAYERS):
        for number, (name, _, _) in enumerate(KINDS):
            block = "self_attn" if number < 4 else "mlp"
            value = 9 + 4 * math.sin(layer / 5 + number) + (number % 3)
            found.append({"path": f"model.layers.{layer}.{block}.{name}", "effective": round(value, 2), "r": R})
    return found


def _settings() -> dict[str, Any]:
    return {
        "seed": {"value": 0, "reason": "default"},
        "out": {"value": "runs/brave-otter", "reason": "given"},
        "r": {"value": R, "reason": "213,400 supervised tokens fill rank 16, not 32"},
        "lora_alpha": {"value": 32, "reason": "twice the rank"},
        "lora_dropout": {"value": 0.05, "reason": "1,087 rows seen 3 times"},
        "target_modules": {"value": "all-linear", "reason": "default"},
        "lr": {"value": 0.0013, "reason": "ten times full fine-tuning's, scaled by the width 576"},
        "schedule": {"value": "cosine", "reason": "default"},
        "clip": {"value": 1.0, "reason": "default"},
        "epochs": {"value": 3.0, "reason": "given"},
        "batch_size": {"value": 24, "reason": "given"},
        "dtype": {"value": "bf16", "reason": "this processor multiplies bf16 in hardware"},
        "micro_batch_tokens": {"value": 8192, "reason": "fits 24 GB with room to spare"},
        "log_with": {"value": [], "reason": "default"},
        "early_stop": {"value": None, "reason": "default"},
        "pack": {"value": True, "reason": "rows differ in length by a factor of 9"},
    }


def _checks() -> list[dict[str, Any]]:
    before = (
        ("step 0 ≡ base", "largest difference of a logit 0.0"),
        ("grads only in A, B", "420 tensors with a gradient, all factors"),
        ("end of turn supervised", "<|im_end|> is inside the loss of all 1,087 rows"),
        ("one batch overfits", "loss 2.31 → 0.04 in 40 steps"),
    )
    after = (
        ("every B moved", "210 of 210"),
        ("reload ≡ live", "largest difference of a logit 0.0"),
        ("merged ≡ adapter", "KL 3e-6 nats"),
        ("off ≡ base", "largest difference of a logit 0.0"),
        ("on ≠ base", "KL 0.61 nats"),
    )
    return [
        {"name": name, "when": when, "passed": True, "detail": detail}
        for when, rows in (("before", before), ("after", after))
        for name, detail in rows
    ]


def made_up_record() -> dict[str, Any]:
    modules = _modules()
    trainable = sum(module["parameters"] for module in modules)
    total = 134_515_008 + trainable
    return {
        "format": 1,
        "loratune": "0.1.0",
        "name": "brave-otter",
        "state": "finished",
        "created": "2026-03-14T09:26:53+00:00",
        "identity": "5f1d" * 16,
        "settings": _settings(),
        "base": {
            "name": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "source": "hub",
            "revision": "12fd25f77366fa6b3b4b768ec3050bf629380bac",
            "fingerprint": "9a3c" * 16,
            "parameters": 134_515_008,
            "dtype": "bfloat16",
            "family": "llama",
        },
        "tokenizer": {"sha256": "77aa" * 16, "chat_template_sha256": "c0de" * 16},
        "data": {
            "source": "support.jsonl",
            "sha256": "beef" * 16,
            "shape": "messages",
            "rows": 1204,
            "train": 1087,
            "val": 117,
            "duplicates": [["support.jsonl:14", "support.jsonl:901"]],
            "truncated": ["support.jsonl:88", "support.jsonl:419", "support.jsonl:733"],
            "dropped": [],
            "fit": {
                "rows": 1201,
                "tokens": 349_800,
                "supervised_tokens": 213_400,
                "longest": 2048,
                "median": 241,
                "characters_per_token": 3.9,
                "unknown_tokens": 0,
            },
        },
        "adapter": {
            "trainable": trainable,
            "total": total,
            "share": trainable / total,
            "modules": modules,
            "effective_rank": _effective_rank(),
        },
        "plan": {
            "steps": STEPS,
            "epochs": 3.0,
            "micro_batch_tokens": 8192,
            "packed": True,
            "pack_reason": "rows differ in length by a factor of 9",
            "recompute": False,
            "estimate": {"memory_bytes": 1_900_000_000, "seconds": 180.0},
        },
        "measured": {"peak_memory_bytes": 1_830_000_000, "seconds": 192.4, "tokens_per_second": 5454.0},
        "checks": _checks(),
        "result": {"base_val_loss": 2.041, "val_loss": 1.312, "best_step": 150, "steps": STEPS, "train_loss": 1.12},
        "events": [
            {"step": 0, "kind": "precision", "text": "bf16: this processor multiplies it in hardware"},
            {
                "step": 37,
                "kind": "memory",
                "text": "out of memory: micro-batch halved to 8,192 tokens, the step done again",
            },
        ],
        "versions": {"loratune": "0.1.0", "torch": "2.11.0", "transformers": "5.17.0", "python": "3.12.4"},
        "hardware": {"processor": "x86_64", "cores": 16, "memory_bytes": 24e9, "device": "cuda:0, 24 GB"},
    }


def made_up_metrics() -> list[dict[str, Any]]:
    draw = random.Random(7)
    lines: list[dict[str, Any]] = [{"step": 0, "val_loss": 2.041}]
    for step in range(1, STEPS + 1):
        noise = draw.gauss(0, 0.08)
        warm = min(1.0, step / 8)
        lines.append(
            {
                "step": step,
                "loss": 1.12 + 0.95 * math.exp(-step / 32) + noise,
                "lr": 0.0013 * warm * 0.5 * (1 + math.cos(math.pi * max(0, step - 8) / (STEPS - 8))),
                "grad_norm": 0.42 + 0.9 * math.exp(-step / 12) + abs(noise),
                "tokens": 6996 + 40 * (step % 7),
                "computed_tokens": 7100,
                "supervised_tokens": 4268,
                "examples": 24,
                "step_seconds": 1.28 + abs(noise) + (0.9 if step == 37 else 0),
                "peak_memory_bytes": 1_830_000_000 if step > 3 else 1_700_000_000,
            }
        )
        if step % 25 == 0:
            lines.append({"step": step, "val_loss": 1.312 + 0.72 * math.exp(-step / 30) - 0.72 * math.exp(-5)})
    return lines


SAMPLES: list[dict[str, Any]] = [
    {
        "place": "support.jsonl:17",
        "prompt": "A customer writes: “The parcel says delivered, but my porch is empty.” Answer in two sentences.",
        "reference": "I'm sorry the parcel isn't there. I have opened a trace and will write by Thursday.",
        "base": "The parcel is delivered. The parcel is delivered to the porch. The porch is empty because the parcel "
        "is delivered, and the customer should check the porch again to see if the parcel has been delivered.",
        "tuned": "I'm sorry the parcel isn't there. I have opened a trace and will write by Thursday.",
    },
    {
        "place": "support.jsonl:204",
        "prompt": 'Classify: "My invoice shows the old address."\n\nOne of: billing, delivery, account',
        "reference": "account",
        "base": "Billing: The invoice shows the old address, so this is a billing issue.\n\n1. Billing\n2. Delivery",
        "tuned": "billing",
    },
]

Write = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> Write:
    """Writes a run folder; any of its three parts can be replaced, or left out as None."""

    def write(record: Any = ..., metrics: Any = ..., samples: Any = ..., name: str = "brave-otter") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        parts = {
            "record.json": json.dumps(made_up_record() if record is ... else record) if record is not None else None,
            "metrics.jsonl": _lines(made_up_metrics() if metrics is ... else metrics),
            "samples.jsonl": _lines(SAMPLES if samples is ... else samples),
        }
        for file_name, text in parts.items():
            if text is not None:
                (folder / file_name).write_text(text, encoding="utf-8")
        return folder

    return write


def _lines(values: list[Any] | None) -> str | None:
    return None if values is None else "".join(json.dumps(value) + "\n" for value in values)
