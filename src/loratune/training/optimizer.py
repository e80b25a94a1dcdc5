"""Optimizers over the adapter's parameters."""

from __future__ import annotations

from typing import Any

import torch


def make_optimizer(name: str, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """AdamW (β 0.9, 0.999) or SGD with momentum 0.9; weight decay comes with the groups."""
    if name == "adamw":
        # One kernel for all tensors: an adapter has hundreds of small ones.
        fused = all(p.device.type in {"cpu", "cuda"} for group in groups for p in group["params"])
        return torch.optim.AdamW(groups, lr=lr, fused=fused)
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


def set_lr(optimizer: torch.optim.Optimizer, lr: float, peak: float) -> None:
    """Set the step's rate; groups with a rate of their own (LoRA+) keep their ratio to the peak."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.setdefault("peak_lr", group["lr"]) / peak
