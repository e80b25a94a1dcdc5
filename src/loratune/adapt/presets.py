"""Which modules an architecture adapts when nobody names any.

LoRA and VeRA: attention projections (Hu et al., arXiv:2106.09685, section 4.2). (IA)³: outputs of keys and values, and
inputs of the feed-forward block's last product (Liu et al., arXiv:2205.05638, section 3.3).
"""

from __future__ import annotations

from loratune.config.methods import IA3

# Queries and values, or the one projection that makes queries, keys and values together.
_NAMES: dict[tuple[str, ...], str] = {
    ("q_proj", "v_proj"): """
        llama mistral mixtral qwen2 qwen3 qwen3_moe gemma gemma2 gemma3_text phi olmo olmo2 granite smollm3 cohere
        stablelm starcoder2 opt gptj gpt_neo bart whisper wav2vec2 vit dinov2 clip siglip
    """,
    ("qkv_proj",): "phi3",
    ("query_key_value",): "gpt_neox bloom falcon",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("Wqkv",): "mpt modernbert",
    ("q", "v"): "t5 mpnet",
    ("query", "value"): "bert roberta electra",
    ("query_proj", "value_proj"): "deberta-v2",
    ("q_lin", "v_lin"): "distilbert",
    # All four, as diffusers' own training scripts have it.
    ("to_q", "to_k", "to_v", "to_out.0"): """
        UNet2DConditionModel DiTTransformer2DModel PixArtTransformer2DModel SD3Transformer2DModel FluxTransformer2DModel
    """,
}

# By the `model_type` of the config, or by the name of the model's class where there is none.
TARGETS: dict[str, tuple[str, ...]] = {
    family: names for names, families in _NAMES.items() for family in families.split()
}

# Keys and values, or the one projection that makes them with the queries, and what is given the feed-forward block's
# inner features. Where that name means other modules too, all of these are rescaled at their inputs, as in peft.
_RESCALED: dict[tuple[tuple[str, ...], str], str] = {
    (("k_proj", "v_proj"), "down_proj"): """
        llama mistral qwen2 qwen3 gemma gemma2 gemma3_text olmo olmo2 granite smollm3 cohere stablelm
    """,
    (("qkv_proj",), "down_proj"): "phi3",
    (("k_proj", "v_proj"), "fc2"): "opt phi bart whisper vit clip siglip dinov2",
    (("k_proj", "v_proj"), "c_proj"): "starcoder2",
    (("query_key_value",), "dense_4h_to_h"): "gpt_neox bloom falcon",
    (("c_attn",), "mlp.c_proj"): "gpt2 gpt_bigcode",
    (("k", "v"), "wo"): "t5",
    (("key", "value"), "output.dense"): "bert roberta electra",
    (("key_proj", "value_proj"), "output.dense"): "deberta-v2",
    (("k_lin", "v_lin"), "lin2"): "distilbert",
}
_IA3 = {
    family: ((*names, inner), (inner,)) for (names, inner), families in _RESCALED.items() for family in families.split()
}


def preset_of(family: str, method: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the targets, and of those among them whose inputs are rescaled; both empty where there is no preset."""
    return _IA3.get(family, ((), ())) if method == IA3 else (TARGETS.get(family, ()), ())
