"""Tokens one at a time, as probabilities name them: the bytes that each puts into the text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from loratune.engine import Chosen

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # what stands for a space in SentencePiece's tokens


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet (`bytes_to_unicode` of openai/gpt-2): printable bytes are themselves, others follow from 256."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_of_character()


class Words:
    """The bytes of each token of a vocabulary.

    A token decoded by itself loses its leading space and, where it is a part of a character, its bytes: they are read
    from the vocabulary, by what the tokenizer's decoder does.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._kinds = set(_kinds(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]))
        self._added = {number: added.content for number, added in tokenizer.added_tokens_decoder.items()}

    def bytes_of(self, token: int) -> bytes:
        if token in self._added:
            return str(self._added[token]).encode()
        piece = self._tokenizer.backend_tokenizer.id_to_token(token)
        if piece is None:  # a place of the output that no token has
            return b""
        if "ByteLevel" in self._kinds:
            if all(character in _BYTES for character in piece):
                return bytes(_BYTES[character] for character in piece)
            return str(piece).encode()
        if "ByteFallback" in self._kinds and (byte := _BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        if _SPACE in piece and self._kinds & {"Metaspace", "Replace"}:
            return str(piece).replace(_SPACE, " ").encode()
        return str(self._tokenizer.decode([token])).encode()

    def word(self, token: int) -> str:
        return self.bytes_of(token).decode(errors="replace")

    # -- as the two kinds of call have them ----------------------------------------------------------------------------

    def of_chat(self, told: Sequence[tuple[int, Chosen]]) -> dict[str, Any]:
        content = [
            {
                **self._one(one.token, one.logprob),
                "top_logprobs": [self._one(token, logprob) for token, logprob in one.likeliest],
            }
            for _, one in told
        ]
        return {"content": content, "refusal": None}

    def of_text(self, told: Sequence[tuple[int, Chosen]]) -> dict[str, Any]:
        return {
            "tokens": [self.word(one.token) for _, one in told],
            "token_logprobs": [one.logprob for _, one in told],
            "top_logprobs": [{self.word(token): logprob for token, logprob in one.likeliest} for _, one in told],
            "text_offset": [offset for offset, _ in told],
        }

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        found = self.bytes_of(token)
        return {
            "token": found.decode(errors="replace"),
            "logprob": -9999.0 if logprob is None else logprob,
            "bytes": list(found),
        }


def _kinds(decoder: dict[str, Any] | None) -> Iterator[str]:
    """The names of the steps of a decoder."""
    if decoder is None:
        return
    yield decoder["type"]
    for step in decoder.get("decoders", ()):
        yield from _kinds(step)
