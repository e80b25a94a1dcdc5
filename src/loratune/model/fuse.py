"""Fused norms and feed-forward blocks for the Llama family and its relatives, in place of those of `transformers`."""

from __future__ import annotations

from torch import nn

from loratune.lora import base_modules, take_off, wears
from loratune.model.gated import fuse_gated
from loratune.model.norm import FusedNorm, fuse_norm


def fuse(model: nn.Module) -> int:
    """Let what the fused blocks can compute be computed by them; the objects, their tensors and hooks stay.

    Returns:
        How many modules were fused; those whose formula is another stay as they are.
    """
    return sum(fuse_norm(module) or fuse_gated(module) for _, module in base_modules(model))


def unfuse(model: nn.Module) -> None:
    """Give every module its own forward back."""
    for _, module in base_modules(model):
        if wears(module, FusedNorm.order):
            take_off(module, FusedNorm.order)
            for name in ("norm_offset", "norm_eps", "gated_activation"):
                vars(module).pop(name, None)
