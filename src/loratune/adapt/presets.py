"""Which modules an architecture adapts when nobody names any: the attention projections (Hu et al., section 4.2)."""

from __future__ import annotations

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
