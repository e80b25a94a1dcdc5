"""PEFT's preparation of a base: quantised, or in half precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from loratune.model import recompute_activations


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze the model, cast what it holds in half precision to fp32, and recompute activations where it is quantised.

    Args:
        gradient_checkpointing_kwargs: {"use_reentrant": True} for the re-entrant kind; the other one is the default.
    """
    quantised = bool(getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        # A 4-bit weight is packed into bytes, which may be declared as half precision.
        if parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.to(torch.float32)
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if quantised and use_gradient_checkpointing:
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)
        else:
            recompute_activations(model)
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is frozen to `dtype`, and what trains to fp32, in place."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
