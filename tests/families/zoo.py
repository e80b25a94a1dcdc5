"""Every family that is promised to work, tiny from its own config, and what it eats.

built("whisper")       random weights from a fixed seed, fp32, evaluation mode, frozen
food_of("whisper")     keyword arguments of its forward pass
answer(model, food)    what it gives, as one tensor
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

VOCABULARY = 400

_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "head_dim": 8}
_GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
_PAIR = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.2, "pad_token_id": 2,
    "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
_IMAGES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8, "initializer_range": 0.2,
}  # fmt: skip
_WORDS = {**_SMALL, "max_position_embeddings": 64}
_HEADS: frozenset[str] = frozenset({"lm_head"})


@dataclass(frozen=True)
class Family:
    """How a model of the family is made.

    Attributes:
        config: class of its config; none where the values go to the model, as in diffusers.
        food: which inputs it takes. queries: how the projections that attention begins with are called.
        left: linear modules that "all-linear" leaves alone.
    """

    model: str
    config: str
    values: Mapping[str, Any]
    queries: tuple[str, ...] = ("q_proj", "v_proj")
    food: str = "words"
    left: frozenset[str] = field(default=_HEADS)


_NEW_HEAD = frozenset({"classifier"})
_NONE: frozenset[str] = frozenset()
_BERT = ("query", "value")
_FUSED = ("query_key_value",)
_DIFFUSION = ("to_q", "to_k", "to_v", "to_out.0")
_PATCHES = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "sample_size": 8,
    "patch_size": 2, "num_embeds_ada_norm": 10,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", _GPT2, ("c_attn",)),
    "gpt_neo": Family(
        "GPTNeoForCausalLM", "GPTNeoConfig",
        {**_SMALL, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "gptj": Family("GPTJForCausalLM", "GPTJConfig", {**_GPT2, "rotary_dim": 8}),
    "gpt_bigcode": Family("GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT2, ("c_attn",)),
    "gpt_neox": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", _SMALL, _FUSED),
    "opt": Family(
        "OPTForCausalLM", "OPTConfig", {**_SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2}
    ),
    "bloom": Family("BloomForCausalLM", "BloomConfig", _BLOOM, _FUSED),
    "falcon": Family("FalconForCausalLM", "FalconConfig", _SMALL, _FUSED),
    "mpt": Family("MptForCausalLM", "MptConfig", {**_BLOOM, "d_model": 32, "n_layers": 2, "n_heads": 4}, ("Wqkv",)),
    "llama": Family("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "mistral": Family("MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": 4}),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", _GROUPED),
    "gemma": Family("GemmaForCausalLM", "GemmaConfig", _GROUPED),
    "gemma2": Family("Gemma2ForCausalLM", "Gemma2Config", {**_GROUPED, "sliding_window": 4}),
    "gemma3_text": Family("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPED, "sliding_window": 4}),
    "phi": Family("PhiForCausalLM", "PhiConfig", _GROUPED),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", _GROUPED, ("qkv_proj",)),
    "olmo": Family("OlmoForCausalLM", "OlmoConfig", _GROUPED),
    "olmo2": Family("Olmo2ForCausalLM", "Olmo2Config", _GROUPED),
    "granite": Family("GraniteForCausalLM", "GraniteConfig", _GROUPED),
    "smollm3": Family("SmolLM3ForCausalLM", "SmolLM3Config", {**_GROUPED, "no_rope_layers": [1, 0]}),
    "cohere": Family("CohereForCausalLM", "CohereConfig", _GROUPED),
    "stablelm": Family("StableLmForCausalLM", "StableLmConfig", _GROUPED),
    "starcoder2": Family("Starcoder2ForCausalLM", "Starcoder2Config", _GROUPED),
    "mixtral": Family(
        "MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        {**_GROUPED, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "t5": Family(
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        ("q", "v"), "two texts",
    ),
    "bart": Family("BartForConditionalGeneration", "BartConfig", _PAIR, food="two texts"),
    "bert": Family("BertForSequenceClassification", "BertConfig", _SMALL, _BERT, left=_NEW_HEAD),
    "roberta": Family("RobertaForTokenClassification", "RobertaConfig", _SMALL, _BERT, left=_NEW_HEAD),
    "electra": Family("ElectraModel", "ElectraConfig", {**_SMALL, "embedding_size": 16}, _BERT, left=_NONE),
    "deberta-v2": Family(
        "DebertaV2ForSequenceClassification", "DebertaV2Config", _SMALL, ("query_proj", "value_proj"), left=_NEW_HEAD
    ),
    "distilbert": Family(
        "DistilBertModel", "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "initializer_range": 0.2},
        ("q_lin", "v_lin"), left=_NONE,
    ),
    "modernbert": Family(
        "ModernBertModel", "ModernBertConfig", {**_SMALL, "cls_token_id": 0, "sep_token_id": 1}, ("Wqkv",), left=_NONE
    ),
    "mpnet": Family("MPNetModel", "MPNetConfig", _SMALL, ("q", "v"), left=_NONE),
    "whisper": Family(
        "WhisperForConditionalGeneration", "WhisperConfig",
        {**_PAIR, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32},
        food="sound", left=frozenset({"proj_out"}),
    ),
    "wav2vec2": Family(
        "Wav2Vec2Model", "Wav2Vec2Config",
        {**_SMALL, "conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0},
        food="wave", left=_NONE,
    ),
    "vit": Family("ViTForImageClassification", "ViTConfig", _IMAGES, food="images", left=_NEW_HEAD),
    "dinov2": Family("Dinov2Model", "Dinov2Config", _IMAGES, food="images", left=_NONE),
    "clip": Family(
        "CLIPModel", "CLIPConfig", {"text_config": _WORDS, "vision_config": _IMAGES, "projection_dim": 16},
        food="images and words", left=_NONE,
    ),
    # The head that pools an image multiplies by its projection itself (nn.MultiheadAttention).
    "siglip": Family(
        "SiglipModel", "SiglipConfig", {"text_config": _WORDS, "vision_config": _IMAGES},
        food="images and words", left=frozenset({"vision_model.head.attention.out_proj"}),
    ),
    "UNet2DConditionModel": Family(
        "UNet2DConditionModel", "",
        {"sample_size": 8, "block_out_channels": [16, 32], "layers_per_block": 1, "cross_attention_dim": 16,
         "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "norm_num_groups": 4, "attention_head_dim": 4,
         "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]},
        _DIFFUSION, "noise and words", _NONE,
    ),
    "DiTTransformer2DModel": Family("DiTTransformer2DModel", "", _PATCHES, _DIFFUSION, "noise and classes", _NONE),
    "PixArtTransformer2DModel": Family(
        "PixArtTransformer2DModel", "",
        {**_PATCHES, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": 16,
         "use_additional_conditions": False, "norm_type": "ada_norm_single"},
        _DIFFUSION, "noise and captions", _NONE,
    ),
    "SD3Transformer2DModel": Family(
        "SD3Transformer2DModel", "",
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
         "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16,
         "pooled_projection_dim": 16, "pos_embed_max_size": 8},
        _DIFFUSION, "noise, words and a summary", _NONE,
    ),
    "FluxTransformer2DModel": Family(
        "FluxTransformer2DModel", "",
        {"in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
         "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": [2, 2, 4]},
        _DIFFUSION, "patches, words and a summary", _NONE,
    ),
}  # fmt: skip


def built(name: str, *, seed: int = 0, head: str = "") -> Any:
    """A model of the family, with another head where one is named, as in "QuestionAnswering"."""
    family = FAMILIES[name]
    # A config object keeps and changes what it is given.
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in family.values.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if head:
            config = getattr(transformers, family.config)(**values)
            model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
        elif family.config:
            model = getattr(transformers, family.model)(getattr(transformers, family.config)(**values))
        else:
            model = getattr(diffusers, family.model)(**values)
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms and biases start at constants, which would hide what they do.
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    # Frozen, since nn.MultiheadAttention computes otherwise where nothing trains.
    return model.eval().requires_grad_(False)


def food_of(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def noise() -> dict[str, Tensor]:
        return {"hidden_states": numbers(2, 4, 8, 8), "timestep": torch.tensor([1, 7])}

    def words() -> dict[str, Tensor]:
        return {"encoder_hidden_states": numbers(2, 5, 16)}

    ids = torch.arange(2 * 6).view(2, 6) * 17 % (VOCABULARY - 3) + 3
    return {
        "words": lambda: {"input_ids": ids},
        "two texts": lambda: {"input_ids": ids, "decoder_input_ids": ids.flip(1)[:, :4]},
        "sound": lambda: {"input_features": numbers(2, 8, 20), "decoder_input_ids": ids[:, :4]},
        "wave": lambda: {"input_values": numbers(2, 400)},
        "images": lambda: {"pixel_values": numbers(2, 3, 16, 16)},
        "images and words": lambda: {"input_ids": ids, "pixel_values": numbers(2, 3, 16, 16)},
        "noise and words": lambda: {"sample": numbers(2, 4, 8, 8), "timestep": torch.tensor([1, 7]), **words()},
        "noise and classes": lambda: {**noise(), "class_labels": torch.tensor([2, 5])},
        "noise and captions": lambda: {**noise(), **words()},
        "noise, words and a summary": lambda: {**noise(), **words(), "pooled_projections": numbers(2, 16)},
        "patches, words and a summary": lambda: {
            **words(),
            "hidden_states": numbers(2, 16, 8),
            "timestep": torch.tensor([0.1, 0.7]),
            "pooled_projections": numbers(2, 16),
            "txt_ids": torch.zeros(5, 3),
            "img_ids": torch.tensor([[0.0, row, column] for row in range(4) for column in range(4)]),
        },
    }[FAMILIES[name].food]()


def answer(model: Any, food: Mapping[str, Tensor]) -> Tensor:
    found = model(**food)
    for name in ("sample", "logits", "logits_per_image", "last_hidden_state"):
        if isinstance(getattr(found, name, None), Tensor):
            answered: Tensor = getattr(found, name)
            return answered
    raise AssertionError(f"{type(found).__name__} holds no answer")
