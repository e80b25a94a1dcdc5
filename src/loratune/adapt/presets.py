"""Which modules an architecture adapts when nobody names any: the attention projections (Hu et al., section 4.2)."""

from __future__ import annotations

_LLAMA_LIKE = ("q_proj", "v_proj")

TARGETS: dict[str, tuple[str, ...]] = {
    "gemma": _LLAMA_LIKE,
    "gemma2": _LLAMA_LIKE,
    "gemma3_text": _LLAMA_LIKE,
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "mixtral": _LLAMA_LIKE,
    "opt": _LLAMA_LIKE,
    "phi3": ("qkv_proj",),
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
}
