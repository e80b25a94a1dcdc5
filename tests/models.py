"""Models of real families, small enough to build in every test, and rows for them.

tiny("qwen3")                         random weights from a fixed seed, fp32, evaluation mode, frozen
exact("qwen3")                        its twin in float64
saved(folder, "llama")                the same as a folder that `from_pretrained` loads, with a ChatML tokenizer
rows_of(7, 12, 5)                     rows of these lengths, of which the second half is supervised
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from loratune.data.example import Place
from loratune.data.render import Rendered
from tests.tiny import tiny_tokenizer

VOCABULARY = 400
EOS, PAD = 1, 2  # <|im_end|> and <|endoftext|> of `tiny_tokenizer`

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    # Ten times the usual one: a leak or a wrong mask then changes logits by their own size, not by a rounding error.
    "initializer_range": 0.2,
}

# Family → (class, config class, what differs from the common config).
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"sliding_window": 4}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"sliding_window": 4}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 4}),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {}),
}

# Families that only few tests need, most for what is odd about their attention.
ODD: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", {}),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", {}),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", {}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4": (
        "Llama4ForCausalLM", "Llama4TextConfig",
        {"intermediate_size_mlp": 64, "num_local_experts": 4, "num_experts_per_tok": 1},
    ),
}  # fmt: skip

_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.2,
}


def tiny(family: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A model of the family with two layers of width 32; `changes` go into its config."""
    model_class, config_class, own = (FAMILIES | ODD)[family]
    common = _GPT2 if family == "gpt2" else _COMMON
    values = {**common, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD, **own, **changes}
    config = getattr(transformers, config_class)(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Norms and biases start at constants, which would hide what they do.
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                assert parameter.isfinite().all(), name
    return model.eval().requires_grad_(False)


def exact(family: str = "llama", **changes: Any) -> Any:
    """The same model in float64, for oracles."""
    model = tiny(family, **changes).double()
    if family == "mixtral":
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    return model


def saved(folder: Path, family: str = "llama", *, tokenizer: Any = None, **changes: Any) -> Path:
    """A folder as people download it: config, safetensors, tokenizer with a ChatML template."""
    tiny(family, **changes).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def rows_of(*lengths: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[Rendered]:
    """Rows of random tokens; the second half of each, and now and then an earlier token, is supervised."""
    dice = random.Random(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = tuple(dice.randrange(3, vocabulary) for _ in range(length))
        mask = [i > 0 and (2 * i >= length or dice.random() < 0.1) for i in range(length)]
        rows.append(Rendered(ids, tuple(mask), Place("rows", number + 1), truncated=False))
    return rows


def branching_rows(*, seed: int = 0, vocabulary: int = VOCABULARY) -> list[Rendered]:
    """Rows that share prefixes in every way: nested, up to their end, whole, hardly, and with masks of their own."""
    dice = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(dice.randrange(3, vocabulary) for _ in range(count))

    system, tools, other = tokens(20), tokens(18), tokens(17)
    long = system + tools + tokens(9)
    all_ids = [long, system + tools + tokens(4), system + tokens(7), long, system + tools, other + tokens(3)]
    all_ids += [other + tokens(5), tokens(6), system[:5] + tokens(8), long[:40]]
    rows = []
    for number, ids in enumerate(all_ids):
        mask = [i > 0 and (3 * i >= 2 * len(ids) or dice.random() < 0.2) for i in range(len(ids))]
        rows.append(Rendered(ids, tuple(mask), Place("rows", number + 1), truncated=False))
    return rows


def additions(count: int) -> list[dict[str, str]]:
    """Rows that a tiny model can learn: a sum and its value."""
    return [{"prompt": f"{n} + {n + 1} =", "completion": f"{2 * n + 1}"} for n in range(count)]


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def encoder(*, seed: int = 0, kind: str = "BertModel", **changes: Any) -> Any:
    """A BERT of two layers without a head, as sentence encoders are published."""
    values = {**_COMMON, "pad_token_id": PAD, **changes}
    config = transformers.BertConfig(
        **{k: v for k, v in values.items() if k not in ("head_dim", "num_key_value_heads")}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, kind)(config)
    return model.eval().requires_grad_(False)


def saved_encoder(folder: Path, **changes: Any) -> Path:
    """The same as a folder that `from_pretrained` loads; its tokenizer puts a token before every text."""
    encoder(**changes).save_pretrained(folder)
    tiny_tokenizer(None, bos="<|begin_of_text|>", adds_bos=True).save_pretrained(folder)
    return folder


def moods(count: int) -> list[dict[str, str]]:
    """Rows that a tiny encoder can learn to tell apart, each second one good."""
    words = {"bad": ("lazy", "dog", "stop"), "good": ("fine", "thank you", "Hello")}
    dice = random.Random(0)
    labels = ["bad" if n % 2 else "good" for n in range(count)]
    return [
        {"text": " ".join(dice.choices(words[label], k=4)) + f" {n}", "label": label} for n, label in enumerate(labels)
    ]


def saved_t5(folder: Path) -> Path:
    """An encoder-decoder of two layers each, as a folder that `from_pretrained` loads."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, initializer_factor=1.0,
        decoder_start_token_id=PAD, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    tiny_tokenizer(None).save_pretrained(folder)
    return folder
