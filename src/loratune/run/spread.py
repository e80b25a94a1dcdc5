"""How a run is spread over processes: a copy of the base in each, or a part of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from loratune.config import TrainConfig
from loratune.errors import ConfigError
from loratune.estimation import BaseMemory
from loratune.model import available_memory, empty_model, pick_device, pick_dtype, total_memory
from loratune.training.optimizer import OPTIMIZERS
from loratune.training.processes import Processes, check_device

# A base that takes more than this of a GPU's memory leaves too little for its activations.
_BASE_SHARE = 0.6
_LAUNCH = "torchrun --nproc-per-node 2 -m loratune train …"


@dataclass(frozen=True)
class Spread:
    """Who trains, and where.

    Attributes:
        sharded: whether each process has a part of the base. reason: why, or why not.
        device: where the parts go; None for wherever the base is.
    """

    processes: Processes = field(default_factory=Processes)
    sharded: bool = False
    reason: str = "one process"
    device: torch.device | None = None

    @property
    def parts(self) -> int:
        """In how many parts the base is kept."""
        return self.processes.count if self.sharded else 1

    def room(self, device: torch.device) -> int:
        """Bytes that each process may take; those on one machine share its memory."""
        sharing = self.processes.here if device.type == "cpu" else 1
        return int(self.processes.least(available_memory(device) // sharing))

    def loading(self, config: TrainConfig) -> dict[str, Any]:
        """Where and in which dtype the base is loaded: what will be divided comes through the CPU's memory."""
        if not self.sharded or self.device is None:
            return {"device": config.device, "dtype": config.dtype}
        found = pick_dtype(config.dtype, self.device).dtype
        return {"device": "cpu", "dtype": "bf16" if found == torch.bfloat16 else "fp32"}

    def words(self) -> str:
        """For the plan's line; nothing of one process."""
        if self.processes.count == 1:
            return ""
        return f" · {self.processes.count} processes, each with {'a part' if self.sharded else 'a copy'} of the base"


def spread_out(model: Any, config: TrainConfig, processes: Processes) -> Spread:
    """Decide it, before anything is loaded.

    Raises:
        ConfigError: what was asked for cannot be divided, or there are too few devices.
    """
    problems = list(_undividable(model, config))
    if processes.count == 1:
        if config.shard == "on":
            raise ConfigError("shard: there is one process, and nothing to divide among", hint=f"start with {_LAUNCH}")
        return Spread(processes)
    named = isinstance(model, str | os.PathLike)
    device = pick_device(config.device)
    _refuse_launch()
    if named:  # a loaded model is where somebody put it
        check_device(processes, device, config.device)
    launched = _told("ACCELERATE_USE_FSDP")
    if config.shard == "on" or (config.shard == "auto" and launched):
        if problems:
            raise ConfigError(problems, hint="leave it out, or say --shard off")
        return Spread(processes, True, "given" if config.shard == "on" else "accelerate's launch asks for it", device)
    if config.shard == "auto" and not problems and device.type == "cuda":
        weights = BaseMemory.of(empty_model(str(model)), 2 if config.dtype != "fp32" else 4, None).weights
        if weights > _BASE_SHARE * total_memory(device):
            why = f"the base's {weights / 2**30:.1f} GB are more than {_BASE_SHARE:.0%} of a GPU's memory"
            return Spread(processes, True, why, device)
    return Spread(processes, False, "given" if config.shard == "off" else "each process has room for the base")


def _told(name: str) -> bool:
    """Whether `accelerate launch`, by its flags or its config file, says so to the processes that it starts."""
    return os.environ.get(name, "").lower() in ("true", "1")


def _refuse_launch() -> None:
    """What accelerate was told and would not happen is refused rather than left out without a word."""
    problems = []
    if _told("ACCELERATE_USE_DEEPSPEED"):
        problems.append("accelerate's launch asks for DeepSpeed, which is not used here")
    if _told("ACCELERATE_USE_MEGATRON_LM"):
        problems.append("accelerate's launch asks for Megatron-LM, which is not used here")
    if _told("ACCELERATE_USE_FSDP") and _told("FSDP_OFFLOAD_PARAMS"):
        problems.append("accelerate's launch asks for weights in the CPU's memory, which stay on the GPUs here")
    if problems:
        raise ConfigError(problems, hint="launch with --use_fsdp --fsdp_version 2, or say --shard on")


def _undividable(model: Any, config: TrainConfig) -> Iterator[str]:
    if not isinstance(model, str | os.PathLike):
        yield "shard: a loaded model could not be given back whole: name its folder or hub id"
    if config.quant is not None:
        yield f"shard: weights in few bits cannot be divided (quant={config.quant!r})"
    if config.init_lora_weights == "eva":
        yield "shard: init='eva' gives the adapter other ranks than the plan, by which its parts are put together"
    if OPTIMIZERS[config.optimizer].of_bitsandbytes:
        yield f"shard: moments in few bits, or paged, cannot be divided (optimizer={config.optimizer!r})"
