"""What a step takes in memory and time, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loratune.adapt import TargetPlan

# Stock transformer blocks keep more than the inputs of their products (normalised copies, rotated heads, gates).
# Measured on Llama-family models; the factor multiplies the activations that the products alone need.
_STOCK_BLOCKS = 2.2
_ADAM_BYTES = 16  # fp32 master, gradient and two moments


@dataclass(frozen=True, slots=True)
class Shape:
    """The widths that decide a decoder's memory and arithmetic."""

    layers: int
    hidden: int
    intermediate: int
    kv: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a transformers config; missing fields take the usual ratios."""
        text = config.get_text_config()
        hidden = text.hidden_size
        heads = getattr(text, "num_attention_heads", 1)
        dim = getattr(text, "head_dim", None) or hidden // heads
        intermediate = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
        kv = (getattr(text, "num_key_value_heads", None) or heads) * dim
        return cls(text.num_hidden_layers, hidden, intermediate, kv, text.vocab_size)


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes at the peak of a step."""

    base: int
    adapter: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.base + self.adapter + self.activations + self.logits


def activation_bytes_per_token(shape: Shape, itemsize: int, *, recompute: bool) -> int:
    """Kept for the backward pass, for each token: 6H + 2·kv + 2I values a layer in the products alone."""
    block = (6 * shape.hidden + 2 * shape.kv + 2 * shape.intermediate) * itemsize * _STOCK_BLOCKS
    kept = shape.hidden * itemsize * shape.layers + block if recompute else block * shape.layers
    return int(kept)


def estimate_memory(
    plan: TargetPlan, shape: Shape, *, itemsize: int, tokens: int, scored: int, recompute: bool
) -> MemoryEstimate:
    """A step over micro-batches of `tokens` tokens, `scored` of which get logits."""
    # Logits in the base's dtype with their gradient, and one chunk of 256 in fp32 with its own.
    logits = 2 * scored * shape.vocabulary * itemsize + 3 * 256 * shape.vocabulary * 4
    return MemoryEstimate(
        plan.base_parameters * itemsize,
        plan.trainable * _ADAM_BYTES,
        tokens * activation_bytes_per_token(shape, itemsize, recompute=recompute),
        logits,
    )


def step_flops(plan: TargetPlan, shape: Shape, tokens: int, scored: int, *, recompute: bool) -> float:
    """Floating-point operations of a LoRA step: 4 a token for each frozen weight, 6 for each of the adapter's."""
    frozen = sum(target.frozen for target in plan.targets)
    return (
        tokens * ((6 if recompute else 4) * frozen + 6 * plan.trainable) + 4 * scored * shape.hidden * shape.vocabulary
    )
