"""Optimizers over the adapter's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loratune.quant import bitsandbytes
from loratune.training.sharding import whole


@dataclass(frozen=True, slots=True)
class OptimizerKind:
    """What is known of an optimizer before there is one.

    Attributes:
        moments: how many values it keeps of each trained parameter.
        of_bitsandbytes: the class there that it is; its kernels are for CUDA.
        instead: the one that is taken elsewhere.
        coarse: whether moments are in eight bits; in fp32 otherwise.
    """

    moments: int
    of_bitsandbytes: str = ""
    instead: str = ""
    coarse: bool = False

    def bytes_of(self, sizes: Iterable[int]) -> int:
        """What it keeps of tensors with so many values each."""
        return sum(self.moments * self._moment_bytes(size) for size in sizes)

    def _moment_bytes(self, size: int) -> int:
        if self.coarse and size >= _LEAST_COARSE:
            return size + 4 * -(-size // _BLOCK)
        return 4 * size


# In eight bits a moment is one byte, with a scale for each block of them (Dettmers et al., "8-bit optimizers via
# block-wise quantization", arXiv:2110.02861). bitsandbytes' `min_8bit_size`: tensors with fewer values stay in fp32.
_BLOCK, _LEAST_COARSE = 256, 4096
# By the names that transformers has for them; paged ones may stand in the host's memory (Dettmers et al., "QLoRA",
# arXiv:2305.14314, section 3).
OPTIMIZERS = {
    "adamw": OptimizerKind(2),
    "adamw_8bit": OptimizerKind(2, "AdamW8bit", instead="adamw", coarse=True),
    "paged_adamw": OptimizerKind(2, "PagedAdamW", instead="adamw"),
    "paged_adamw_8bit": OptimizerKind(2, "PagedAdamW8bit", instead="adamw", coarse=True),
    "sgd": OptimizerKind(1),
}


def make_optimizer(name: str, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """AdamW (β 0.9, 0.999) of some kind, or SGD with momentum 0.9; weight decay comes with the groups.

    Raises:
        MissingExtraError: it is one of bitsandbytes', which is not installed.
    """
    kind = OPTIMIZERS[name]
    if kind.of_bitsandbytes:
        found: torch.optim.Optimizer = getattr(bitsandbytes("optim", f"optimizer={name!r}"), kind.of_bitsandbytes)(
            groups, lr=lr
        )
        return found
    if name == "adamw":
        # One kernel for all tensors: an adapter has hundreds of small ones.
        fused = all(p.device.type in {"cpu", "cuda"} for group in groups for p in group["params"])
        return torch.optim.AdamW(groups, lr=lr, fused=fused)
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


def clipped_norm(parameters: Sequence[nn.Parameter], most: float) -> float:
    """The norm of all gradients together, which are scaled down to `most` where it is larger."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    found = float(whole(norm))
    # Where torch's factor, most / (norm + 1e-6), is cut to one, gradients would be read and written for nothing.
    if not found + 1e-6 <= most:
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return found


def set_lr(optimizer: torch.optim.Optimizer, lr: float, peak: float) -> None:
    """Set the step's rate; groups with a rate of their own (LoRA+) keep their ratio to the peak."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.setdefault("peak_lr", group["lr"]) / peak
