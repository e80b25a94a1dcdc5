"""A model and tokenizer made on the spot, for trying a machine out: no download, no file."""

from __future__ import annotations

import string

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)


def tiny_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A two-layer Llama over single characters, drawn from a fixed seed, in fp32."""
    pad, end, unknown = specials = ("<pad>", "<eos>", "<unk>")
    characters = [*specials, *string.printable]
    vocabulary = {character: index for index, character in enumerate(characters)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, eos_token=end, unk_token=unknown)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.name_or_path = "tiny"
    return model, tokenizer
