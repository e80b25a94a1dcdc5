"""Where to compute and in which precision, and how much memory is there."""

from __future__ import annotations

import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from loratune.errors import ConfigError
from loratune.model.container import allowance

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Precision:
    dtype: torch.dtype
    reason: str


def pick_device(wanted: str | None) -> torch.device:
    """The named device, or CUDA, MPS or the CPU, whichever comes first and is there."""
    if wanted is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        if device.type == "meta":
            raise RuntimeError("it holds shapes alone, no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise _no_device(wanted, error) from None
    return device


def kind_of_device(wanted: str | None) -> str:
    """The type of the device that `pick_device` would take; a named one need not be here."""
    if wanted is None:
        return pick_device(None).type
    try:
        return torch.device(wanted).type
    except RuntimeError as error:
        raise _no_device(wanted, error) from None


def _no_device(wanted: str, error: Exception) -> ConfigError:
    return ConfigError(f"device={wanted!r}: {str(error).splitlines()[0]}", hint="cpu always works")


def pick_dtype(wanted: str, device: torch.device) -> Precision:
    """bf16 where the hardware multiplies it fast, else fp32."""
    if wanted in _DTYPES:
        return Precision(_DTYPES[wanted], "given")
    if wanted != "auto":
        raise ConfigError(f"dtype={wanted!r}: not one of auto, bf16, fp32")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and has_fast_bf16_cpu()
    if fast:
        return Precision(torch.bfloat16, f"this {device.type} has fast bf16")
    return Precision(torch.float32, f"this {device.type} has no fast bf16")


def has_fast_bf16_cpu() -> bool:
    """AVX512-BF16 or AMX: with neither, bf16 products are emulated and slower than fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def available_memory(device: torch.device) -> int:
    """Bytes that a run may take now: of a container's where it is less; on a GPU with those that torch keeps."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    free, allowed = int(psutil.virtual_memory().available), allowance()
    return free if allowed is None else min(free, allowed.left)


def total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    there, allowed = int(psutil.virtual_memory().total), allowance()
    return there if allowed is None else min(there, allowed.total)


def peak_memory(device: torch.device) -> int:
    """The most bytes taken so far: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def processor_name() -> str:
    """The processor as the operating system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
