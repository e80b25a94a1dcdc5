"""Tokenizers as llama.cpp has them; what it makes of them itself is in tests/run/test_llama_cpp.py."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from loratune.errors import ModelError
from loratune.gguf import vocabulary_of
from tests.gguf.tokenizers import SPLITS, pieces, split_like
from tests.tiny import LLAMA3, tiny_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def test_tokens_have_their_places_and_types() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    found = vocabulary_of(tokenizer, 404)
    assert found.model == "gpt2"
    assert found.tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert found.tokens[-3:] == ["[PAD401]", "[PAD402]", "[PAD403]"]
    assert found.types == [CONTROL] * 7 + [NORMAL] * 393 + [USER_DEFINED] + [UNUSED] * 3
    assert found.ids == {"eos": 1, "pad": 2}
    assert found.adds == {"bos": False, "eos": False, "space": False}
    assert found.template == tokenizer.chat_template
    assert found.scores == []
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert found.merges == [f"{left} {right}" for left, right in merges]


def test_what_is_put_around_a_text() -> None:
    tokenizer = tiny_tokenizer(LLAMA3, bos="<|begin_of_text|>", eos="<|eot_id|>", adds_bos=True)
    found = vocabulary_of(tokenizer, 400)
    assert found.adds == {"bos": True, "eos": False, "space": False}
    assert found.ids["bos"] == tokenizer.bos_token_id
    tokenizer.chat_template = {"tool_use": "no", "default": "yes"}
    assert vocabulary_of(tokenizer, 400).template == "yes"


@pytest.mark.parametrize("name", SPLITS)
def test_the_name_of_a_split(name: str) -> None:
    assert vocabulary_of(split_like(name), 900).pre == name


def test_pieces_score_by_the_order_of_their_merges() -> None:
    tokenizer = pieces()
    found = vocabulary_of(tokenizer, 500)
    assert (found.model, found.adds["space"]) == ("llama", True)
    assert found.types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert found.types.count(BYTE) == 256
    scores = [found.scores[found.tokens.index(merge.replace(" ", ""))] for merge in found.merges]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == 0
    assert min(found.scores) == found.scores[found.tokens.index("T")] < scores[-1]
    assert not vocabulary_of(pieces(scheme="never"), 500).adds["space"]


def of(model: Any, step: Any = None, normalizer: Any = None) -> Any:
    backend = Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if step is not None:
        backend.pre_tokenizer = step
    return PreTrainedTokenizerFast(tokenizer_object=backend)


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
PIECES = models.BPE({"a": 0}, [], byte_fallback=True)


def test_text_that_is_changed_as_llama_cpp_changes_it() -> None:
    assert vocabulary_of(of(models.BPE({"a": 0}, []), BYTES, normalizers.NFC()), 1).pre == "gpt-2"
    assert vocabulary_of(pieces(scheme="prepend"), 500).adds["space"]


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (of(models.Unigram([("a", 0.0)], 0)), "kind Unigram"),
        (of(models.BPE({"a": 0}, []), pre_tokenizers.Whitespace()), "splits text so: Whitespace"),
        (of(models.BPE({"a": 0}, []), pre_tokenizers.ByteLevel(add_prefix_space=True)), "ByteLevel None"),
        (of(models.BPE({"a": 0}, [])), "not at all"),
        (of(models.BPE({"a": 0}, []), BYTES, normalizers.Lowercase()), "change text.*: Lowercase"),
        (
            of(PIECES, normalizer=normalizers.Sequence([normalizers.Replace("x", "▁"), normalizers.NFC()])),
            "Replace, NFC",
        ),
        (of(PIECES, pre_tokenizers.Metaspace(replacement="_")), "Metaspace"),
        (split_like("gpt-2"), "tokens up to 466, and the model 5 rows"),
        (object(), "object: it cannot"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_llama_cpp_cannot_have_is_refused(tokenizer: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        vocabulary_of(tokenizer, 5)
    assert "5 rows" in words or all(name in caught.value.hint for name in (*SPLITS, "SentencePiece"))
