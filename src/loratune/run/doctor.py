"""`doctor`: versions, devices, memory, and a real training step on a model small enough for any machine."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from loratune.estimation import matmul_rate
from loratune.model import available_memory, device_name, kernels_of, pick_device, pick_dtype, tiny_model, total_memory
from loratune.run.record import versions
from loratune.run.train import train

_ROWS = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(4) for b in range(4)]


def doctor() -> dict[str, Any]:
    """What this machine has, and whether a whole tiny run passes its checks here."""
    device = pick_device(None)
    precision = pick_dtype("auto", device)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = tiny_model()
        move: Any = model.to
        move(device)
        out = str(Path(folder) / "run")
        run = train(model, _ROWS, tokenizer=tokenizer, out=out, max_steps=4, lr=1e-2, samples=0)
    return {
        "versions": versions(),
        "device": device_name(device),
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "memory_bytes": total_memory(device),
        "available_bytes": available_memory(device),
        "kernels": kernels_of(device).named,
        "dtype": str(precision.dtype).removeprefix("torch."),
        "dtype_reason": precision.reason,
        "gflops": round(matmul_rate(device, precision.dtype) / 1e9),
        "tiny_run_seconds": round(time.perf_counter() - started, 2),
        "checks": run.record["checks"],
    }
