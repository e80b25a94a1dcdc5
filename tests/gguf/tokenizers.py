"""Tokenizers that split text as known models do, over one small vocabulary each."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import CHATML, SENTENCES

_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LIKE_GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# As they stand in the models' own tokenizer.json.
REGEXES = {"llama-bpe": _LIKE_GPT4 + r"\p{N}{1,3}|" + _REST, "qwen2": _LIKE_GPT4 + r"\p{N}|" + _REST, "tekken": _TEKKEN}
SPLITS = ("gpt-2", "smollm", *REGEXES)

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "We'll say IT'S 12345678 o'clock, don't you?  two  spaces\n\n\nlines \t tab",
    "naïve café, 北京 🙂 ÀÉÎ camelCaseWORD x=1.5e-3/path//to\r\n",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    " leading and trailing  ",
)


def split_like(name: str) -> Any:
    """A byte-level tokenizer whose merges reach over every border, so that another split gives other tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=4,
        show_progress=False,
    )
    backend.train_from_iterator([*SENTENCES, *TEXTS] * 4, trainer)
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in REGEXES)]
    if name == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif name in REGEXES:
        steps.insert(0, pre_tokenizers.Split(Regex(REGEXES[name]), behavior="isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=CHATML)


def pieces(*, scheme: str = "first") -> Any:
    """SentencePiece's BPE with bytes to fall back on, as Llama 2 and Mistral have it.

    Args:
        scheme: of the space before a text: "first" and "never" as in newer files, "prepend" as in older ones.
    """
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "prepend":
        spaces: list[Any] = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(spaces)  # type: ignore[assignment]
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)  # type: ignore[assignment]
    backend.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        max_token_length=12,
        show_progress=False,
    )
    # Learned word by word: a piece never reaches over a space.
    words = [word for text in SENTENCES for word in text.replace(" ", " ▁").split()]
    backend.train_from_iterator(words * 4, trainer)
    said = json.loads(backend.to_str())
    # The bytes are pieces, not tokens of their own in the text.
    said["added_tokens"] = said["added_tokens"][:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(said)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHATML,
    )
