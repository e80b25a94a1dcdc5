"""Recomputing activations in the backward pass instead of keeping them."""

from __future__ import annotations

from transformers import PreTrainedModel

from loratune.errors import ModelError


def recompute_activations(model: PreTrainedModel) -> None:
    """Keep only each block's input. Needs no gradient in the input embeddings, unlike the re-entrant kind.

    Raises:
        ModelError: the family does not support it.
    """
    # Renamed in transformers 5.2x; the range of versions supported here has both names.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except (ValueError, TypeError) as error:
        raise ModelError(f"this model cannot recompute activations: {error}", hint="--recompute off") from None
    # Enabling also makes the embeddings' output require gradients, which only the re-entrant kind needs.
    model.disable_input_require_grads()


def keep_activations(model: PreTrainedModel) -> None:
    """The opposite of `recompute_activations`; does nothing where nothing is recomputed."""
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
        disable()
