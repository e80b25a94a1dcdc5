"""What llama.cpp has to know of a model beside its tensors, and which models it cannot have from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loratune.errors import ModelError
from loratune.gguf.names import ARCHITECTURES, refuse_others

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Where llama.cpp takes factors for the rotation's frequencies, and transformers' scalings that are nothing else.
_SCALED = {"llama"}
_FIXED = ("default", "linear", "llama3")
# transformers' GGUF reader knows no head size in these and takes this one, or the width over the heads.
_HEAD_SIZE_READ = {"qwen2": None, "qwen3": 128}


@dataclass(frozen=True, slots=True)
class Shape:
    """
    Attributes:
        head_size: width of one attention head. context: positions on which llama.cpp computes what the model does.
        factors: what each of the rotation's frequencies is divided by; None where all are as the base says.
        notes: where a reader of the file differs from the model.
    """

    config: Any
    head_size: int
    context: int
    factors: NDArray[np.float32] | None
    notes: tuple[str, ...]

    def write(self, writer: Any) -> None:
        config = self.config
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(self.context)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        # Where it is missing, llama.cpp takes 10 000 and says nothing.
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(self.head_size)


def shape_of(config: Any, frequencies: Tensor) -> Shape:
    """
    Args:
        config: the model's, as transformers has it. frequencies: of its rotation, as it computes with them.

    Raises:
        ModelError: everything that stands against it.
    """
    refuse_family(config)
    problems = list(_problems(config))
    if problems:
        raise ModelError(problems, hint="`loratune merge` it and try llama.cpp's own converter")
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    factors = _factors(config, head_size, frequencies)
    window = _window(config)
    context = min(config.max_position_embeddings, window or config.max_position_embeddings)
    return Shape(config, head_size, context, factors, tuple(_notes(config, head_size, window, factors)))


def refuse_family(config: Any) -> None:
    refuse_others(config, FAMILIES, "models", ModelError)


def _problems(config: Any) -> list[str]:
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    problems = []
    if config.hidden_act != "silu":
        problems.append(f"hidden_act={config.hidden_act!r}: llama.cpp computes silu in this family")
    if kind not in (_FIXED if ARCHITECTURES[config.model_type] in _SCALED else ("default",)):
        problems.append(f"rope_type={kind!r}: positions scaled so are not written here for {config.model_type}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append("partial_rotary_factor: llama.cpp turns whole heads in this family")
    if config.model_type == "qwen3" and config.attention_bias:
        problems.append("attention_bias: llama.cpp's qwen3 has none")
    return problems


def _factors(config: Any, head_size: int, frequencies: Tensor) -> NDArray[np.float32] | None:
    if config.rope_parameters.get("rope_type", "default") == "default":
        return None
    powers = torch.arange(0, head_size, 2, dtype=torch.float64) / head_size
    plain = config.rope_parameters["rope_theta"] ** -powers
    return np.asarray(plain / frequencies.detach().cpu().double(), dtype=np.float32)


def _window(config: Any) -> int | None:
    window = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True) or window >= config.max_position_embeddings:
        return None
    return int(window)


def _notes(config: Any, head_size: int, window: int | None, factors: Any) -> list[str]:
    notes = []
    if window:
        notes.append(f"context {window:,}: the model attends to no more, and llama.cpp's {config.model_type} would")
    family = config.model_type
    read = _HEAD_SIZE_READ.get(family, head_size) or config.hidden_size // config.num_attention_heads
    unread = [f"heads of {head_size} (it takes {read})"] if read != head_size else []
    if factors is not None:
        unread.append("the scaling of positions")
    unread += [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    if unread:
        notes.append(f"llama.cpp reads it; transformers' GGUF reader does not read {', '.join(unread)}")
    return notes
