"""Fused norms, attention and feed-forward blocks for the Llama family and its relatives, in place of those of
`transformers`."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from loratune.kernels import deviation, furthest
from loratune.lora import base_modules, base_of, take_off, wears
from loratune.model.attention import NAME
from loratune.model.fused import Fused, is_near
from loratune.model.gated import fuse_gated, is_gated
from loratune.model.last_layer import fuse_last
from loratune.model.modes import evaluating
from loratune.model.norm import fuse_norm
from loratune.model.self_attention import fuse_attention, trial_rows
from loratune.model.tiled_linear import fuse_linear


def fuse(model: nn.Module) -> int:
    """Let what the fused blocks can compute be computed by them; the objects, their tensors and hooks stay.

    Attention, and the last layer, only where the model takes packed rows.

    Returns:
        How many modules were fused; those whose formula is another stay as they are.
    """
    kinds = (fuse_norm, fuse_gated, fuse_attention)
    found = sum(any(kind(module) for kind in kinds) for _, module in base_modules(model))
    if found:
        found += sum(fuse_linear(module) for _, module in base_modules(model))
    return found + fuse_last(model)


def unfuse(model: nn.Module) -> None:
    """Give every module its own forward back."""
    for _, module in base_modules(model):
        if wears(module, Fused.order):
            settings = cast(Fused, module).settings
            take_off(module, Fused.order)
            for name in settings:
                vars(module).pop(name, None)


def fused(model: nn.Module) -> bool:
    """Whether something in the model is fused."""
    return any(wears(module, Fused.order) for _, module in base_modules(model))


def may_be_fused(model: nn.Module) -> bool:
    """Whether `fuse` will find blocks, as far as their names say: for models without weights."""
    return any(is_gated(module) for _, module in base_modules(model))


def why_not_fused(model: PreTrainedModel) -> str | None:
    """None if every fused module gives what it gave before, else the reason; leaves the model fused or not.

    Module by module, on what reaches it: a model amplifies roundings, so that the logits of two sound ways may be far
    apart in low precision (SmolLM2 in bf16 is 85 % off its own fp32 on tokens it has never been trained on).
    """
    if not fuse(model):
        return "this family has no blocks that can be fused"
    try:
        most, path = _furthest(model)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        unfuse(model)
        return f"a fused block fails in it ({type(error).__name__})"
    if is_near(most, model.dtype):
        return None
    unfuse(model)
    return f"the fused {path} deviates from the stock one by {most:.1%}"


@torch.no_grad()
def _furthest(model: PreTrainedModel) -> tuple[float, str]:
    """The largest relative deviation of a fused module from its own class's forward, and its path."""
    embeddings: Any = model.get_input_embeddings()
    packed, positions = trial_rows(model.device)
    ids = torch.arange(positions.shape[1], device=model.device)[None] % embeddings.weight.shape[0]
    inputs: dict[str, Any] = {"use_cache": False}
    if model.config._attn_implementation == NAME:
        inputs = {"position_ids": positions, **packed}
    found = [(0.0, "")]

    def compare(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        stock = base_of(type(module)).forward(module, *args, **kwargs)
        pair = (output[0], stock[0]) if isinstance(output, tuple) else (output, stock)
        found.append((deviation(*pair), path))

    hooks = [
        module.register_forward_hook(partial(compare, path), with_kwargs=True)
        for path, module in base_modules(model)
        if wears(module, Fused.order)
    ]
    try:
        with evaluating(model):
            model(input_ids=ids, **inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return furthest(found)
