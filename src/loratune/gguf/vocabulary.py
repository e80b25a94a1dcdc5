"""A tokenizer as llama.cpp has it: tokens with their types, merges or scores, and how text is split before them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratune.errors import ModelError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_BYTES, _BYTES_ONLY = ("ByteLevel", True), ("ByteLevel", False)

# How a byte-level tokenizer splits text → llama.cpp's name for it. By a wrong name it splits wrongly, and says nothing.
_SPLITS: dict[tuple[tuple[str, Any], ...], str] = {
    (_BYTES,): "gpt-2",
    (("Digits", True), _BYTES): "smollm",
    (("Split", rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"), _BYTES_ONLY): "llama-bpe",
    (("Split", rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"), _BYTES_ONLY): "qwen2",
    (("Split", rf"{_TEKKEN}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"), _BYTES_ONLY): "tekken",
}
_KNOWN = f"byte-level BPE split like {', '.join(_SPLITS.values())}, and SentencePiece's BPE"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """
    Attributes:
        model: llama.cpp's kind, "gpt2" (byte-level BPE) or "llama" (SentencePiece's BPE). pre: how text is split.
        scores: of the second kind: what is merged first has the highest.
        ids: bos, eos, unk and pad, where there are such.
        adds: whether bos and eos are put around a text, and a space before it.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    ids: dict[str, int]
    adds: dict[str, bool]
    template: str | None

    def write(self, writer: Any) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        writer.add_token_scores(self.scores)
        for name, number in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.adds["bos"])
        writer.add_add_eos_token(self.adds["eos"])
        writer.add_add_space_prefix(self.adds["space"])
        if self.template is not None:
            writer.add_chat_template(self.template)


def vocabulary_of(tokenizer: Any, size: int) -> Vocabulary:
    """
    Args:
        tokenizer: a fast one of transformers. size: rows of the model's embedding; those without a token get a name.

    Raises:
        ModelError: llama.cpp has no such tokenizer, or the model has fewer rows than it has tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{type(tokenizer).__name__}: it cannot be written as GGUF", hint=_KNOWN)
    said = json.loads(backend.to_str())
    if said["model"]["type"] != "BPE":
        raise ModelError(f"a tokenizer of kind {said['model']['type']} cannot be written as GGUF", hint=_KNOWN)
    pieces = bool(said["model"]["byte_fallback"])
    _refuse_changing(said, pieces=pieces)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in said["model"]["merges"]]
    tokens, types = _tokens(tokenizer, said, size, pieces=pieces)
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    around = tokenizer("a")["input_ids"]
    adds = {"bos": around[0] == ids["bos"], "eos": around[-1] == ids["eos"], "space": pieces and _adds_space(said)}
    return Vocabulary(
        "llama" if pieces else "gpt2",
        "default" if pieces else _split(said),
        tokens,
        types,
        merges,
        _scores(tokens, merges) if pieces else [],
        {name: number for name, number in ids.items() if number is not None},
        adds,
        _template(tokenizer),
    )


def _refuse_changing(said: Mapping[str, Any], *, pieces: bool) -> None:
    """llama.cpp changes no text before it is split: what else does must be what it does to spaces, or rare (NFC)."""
    kept = {"Prepend", "Replace", "Metaspace"} if pieces else {"NFC"}
    steps = _steps(said["normalizer"], "normalizers") + (_steps(said["pre_tokenizer"]) if pieces else [])
    others = [step["type"] for step in steps if step["type"] not in kept or not _is_of_spaces(step)]
    if others:
        raise ModelError(f"llama.cpp does not change text as this tokenizer does: {', '.join(others)}", hint=_KNOWN)


def _is_of_spaces(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Replace":
        return (step["pattern"].get("String"), step["content"]) == (" ", "▁")
    return bool(step.get("prepend", "▁") == step.get("replacement", "▁") == "▁")


def _split(said: Mapping[str, Any]) -> str:
    steps = _steps(said["pre_tokenizer"])
    found = tuple((step["type"], _how(step)) for step in steps)
    if found not in _SPLITS:
        shown = "; ".join(f"{kind} {how}" for kind, how in found) or "not at all"
        raise ModelError(f"llama.cpp knows no tokenizer here that splits text so: {shown}", hint=_KNOWN)
    return _SPLITS[found]


def _steps(step: Mapping[str, Any] | None, several: str = "pretokenizers") -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return list(step[several]) if step["type"] == "Sequence" else [step]


def _how(step: Mapping[str, Any]) -> Any:
    """What makes two steps of a kind differ; what no known tokenizer has makes it like none of them."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return step["use_regex"]
    if step["type"] == "Digits":
        return step["individual_digits"]
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex")
    return None


def _adds_space(said: Mapping[str, Any]) -> bool:
    steps = _steps(said["normalizer"], "normalizers") + _steps(said["pre_tokenizer"])
    return any(step["type"] == "Prepend" or step.get("prepend_scheme") in ("first", "always") for step in steps)


def _tokens(tokenizer: Any, said: Mapping[str, Any], size: int, *, pieces: bool) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    if by_id and max(by_id) >= size:
        raise ModelError(
            f"the tokenizer has tokens up to {max(by_id)}, and the model {size} rows for them",
            hint="give the model its own tokenizer back",
        )
    added = {int(token["id"]): bool(token["special"]) for token in said["added_tokens"]}
    tokens, types = [], []
    for number in range(size):
        token = by_id.get(number)
        kind = TokenType.NORMAL
        if token is None:
            kind = TokenType.UNUSED
        elif pieces and number == tokenizer.unk_token_id:
            kind = TokenType.UNKNOWN
        elif number in added:
            kind = TokenType.CONTROL if added[number] else TokenType.USER_DEFINED
        elif pieces and len(token) == 6 and token.startswith("<0x"):
            kind = TokenType.BYTE
        tokens.append(f"[PAD{number}]" if token is None else token)
        types.append(int(kind))
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """llama.cpp joins the neighbours whose whole scores highest, where the tokenizer has a list of merges in order."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), number)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _template(tokenizer: Any) -> str | None:
    """The chat template; of several, the one called "default"."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template or None
