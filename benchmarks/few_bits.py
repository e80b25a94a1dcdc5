"""The memory of a training step on a base in four and eight bits, beside the same on a base in bf16.

python benchmarks/few_bits.py            print the table, write benchmarks/results/few_bits.json
python benchmarks/few_bits.py --quick    does it run?

A model of a billion random weights (the widths of TinyLlama-1.1B), rank 8 on all linears, steps of 4 × 64 tokens, a
fresh process for each format. `held` are the bytes of the base's tensors; `peak` is the most that tensors hold in a
step: those, the adapter with its gradients and moments, and what a step makes; `process` is the most that the process
takes in three steps, imports and all, `load` the most that it took before, to load and quantise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import weights
from clock import live_bytes
from comparison import RESULTS, say, write
from measuring import surroundings

import loratune as lt
from loratune.data.batch import make_batch
from loratune.data.example import Place
from loratune.data.render import Rendered
from loratune.lora import base_modules
from loratune.loss import summed_loss
from loratune.model import freed_memory_kept, fuse, load_base, use_packed_attention
from loratune.quant import stored_in

FORMATS = ("bf16", "int8", "nf4")
ROWS, LENGTH, STEPS, RANK = 4, 64, 3, 8


def resident(name: str = "VmHWM") -> int:
    """The most that this process has taken since the last `forget`, or what it takes now (VmRSS)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def forget() -> None:
    """Let the kernel count the most from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def measured(base: str, quant: str, counted: bool) -> dict[str, int]:
    """Bytes: of tensors where they are counted, else of the process."""
    found = load_base(base, dtype="bf16", quant=None if quant == "bf16" else quant)
    held = sum(tensor.numel() * tensor.itemsize for _, tensor in stored_in(base_modules(found.model)))
    load = resident()
    use_packed_attention(found.model)
    lora = lt.attach(found.model, lt.LoraConfig(r=RANK, target_modules="all-linear"))
    fuse(found.model)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(3, 1000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [Rendered(tuple(row), (False, *[True] * (LENGTH - 1)), Place("", 1), False) for row in ids]
    batch = make_batch(rows, packed=True, pad_id=0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        (summed_loss(found.model, batch) / batch.supervised).backward()
        optimizer.step()

    if counted:  # in a process of its own: counting takes memory too
        live = live_bytes(step, cuda=False)  # gradients and moments are made in the first step
        masters = sum(parameter.numel() * parameter.itemsize for parameter in lora.parameters())
        return {"peak": held + masters + live}
    forget()
    with freed_memory_kept(found.device):
        for _ in range(STEPS):
            step()
        process = resident()  # inside: what is freed goes back afterwards
    return {"held": held, "process": process, "load": load}


def write_random(shape: str, folder: Path) -> Path:
    """A folder with weights of small random numbers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    weights.write_base(shape, folder)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.02)
    for buffer in model.buffers():
        buffer.data.fill_(0.5)
    model.save_pretrained(folder)
    return folder


def table(result: dict[str, Any]) -> str:
    columns, whole = ("held", "peak", "process", "load"), result["formats"]["bf16"]
    lines = [f"{'MiB, of bf16':14}{''.join(f'{column:>16}' for column in columns)}"]
    for name, found in result["formats"].items():
        sizes = (f"{found[key] / 2**20:.0f} ({found[key] / whole[key]:.2f})" for key in columns)
        lines.append(f"{name:14}{''.join(f'{size:>16}' for size in sizes)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny weights: does it run?")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="OMP_NUM_THREADS (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"where the result goes (default {RESULTS.name})")
    parser.add_argument("--one", nargs=3, metavar=("BASE", "FORMAT", "WHAT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(*given.one[:2], given.one[2] == "tensors")))
        return
    environment = os.environ | {"OMP_NUM_THREADS": str(given.threads), "HF_HUB_OFFLINE": "1"}
    shape = "tiny" if given.quick else "tinyllama-1.1b"
    with tempfile.TemporaryDirectory() as folder:
        say("writing the weights")
        base = write_random(shape, Path(folder) / "base")
        formats = {}
        for quant in FORMATS:
            say(quant)
            found: dict[str, int] = {}
            for what in ("process", "tensors"):
                command = [sys.executable, __file__, "--one", str(base), quant, what]
                done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                found |= json.loads(done.stdout.splitlines()[-1])
            formats[quant] = found
    work = {"shape": shape, "rows": ROWS, "length": LENGTH, "rank": RANK}
    result = {"work": work, "formats": formats, **surroundings("loratune", threads=given.threads)}
    print(table(result))
    write(result, given, "few_bits")


if __name__ == "__main__":
    main()
