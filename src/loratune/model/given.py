"""A model that somebody else loaded: it leaves a run as it came."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from loratune.model.fuse import fused, unfuse
from loratune.model.recompute import keep_activations


@contextmanager
def given_back(model: Any) -> Iterator[None]:
    """After the block a loaded model trains, recomputes and computes as before it; the name of one passes through."""
    if not isinstance(model, PreTrainedModel):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    recomputed = any(getattr(module, "gradient_checkpointing", False) for module, _ in modes)
    attention, was_fused = model.config._attn_implementation, fused(model)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        if not recomputed:
            keep_activations(model)
        if not was_fused:
            unfuse(model)
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
