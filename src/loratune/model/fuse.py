"""Fused norms and feed-forward blocks for the Llama family and its relatives, in place of those of `transformers`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from loratune.lora import base_modules, take_off, wears
from loratune.model.gated import fuse_gated, is_gated
from loratune.model.modes import evaluating
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


def fused(model: nn.Module) -> bool:
    """Whether something in the model is fused."""
    return any(wears(module, FusedNorm.order) for _, module in base_modules(model))


def may_be_fused(model: nn.Module) -> bool:
    """Whether `fuse` will find blocks, as far as their names say: for models without weights."""
    return any(is_gated(module) for _, module in base_modules(model))


def why_not_fused(model: PreTrainedModel) -> str | None:
    """None if the fused model gives what the stock one gives, else the reason; leaves it fused or not."""
    embeddings: Any = model.get_input_embeddings()
    ids = torch.arange(16, device=model.device)[None] % embeddings.weight.shape[0]
    with torch.no_grad(), evaluating(model):
        stock = model(input_ids=ids, use_cache=False).logits.float()
        if not fuse(model):
            return "this family has no blocks that can be fused"
        found = model(input_ids=ids, use_cache=False).logits.float()
    deviation = float((found - stock).norm() / stock.norm())
    if deviation <= (1e-4 if model.dtype == torch.float32 else 5e-2):
        return None
    unfuse(model)
    return f"fused blocks deviate from the stock ones by {deviation:.1%}"
