"""How well data and tokenizer fit, and which tokens are in the loss: what people look at before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from loratune.data.render import Rendered, RenderedCorpus
from loratune.data.tokens import Tokenizer


@dataclass(frozen=True, slots=True)
class Fit:
    """Counts over rendered rows; lengths in tokens.

    Args:
        characters_per_token: about 4 for English and a tokenizer that knows it; near 1 says that it does not.
        unknown_tokens: ids that stand for text the tokenizer cannot write.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    longest: int
    median: int
    mean: float
    characters_per_token: float
    unknown_tokens: int
    dropped: int = 0
    truncated: int = 0
    special_tokens_in_text: int = 0

    @property
    def supervised_share(self) -> float:
        """Share of tokens that are in the loss, 0 to 1."""
        return self.supervised_tokens / self.tokens if self.tokens else 0.0


def fit(corpus: RenderedCorpus | Sequence[Rendered], tokenizer: Tokenizer) -> Fit:
    """Measures rendered rows (at least one).

    The median is the upper one of an even number of rows. Where the unknown token is also the end or beginning of a
    sequence (GPT-2), the tokenizer can write every text and none counts as unknown.
    """
    whole = corpus if isinstance(corpus, RenderedCorpus) else None
    rows = whole.rows if whole else tuple(corpus) if not isinstance(corpus, RenderedCorpus) else ()
    lengths = sorted(len(row.ids) for row in rows)
    tokens = sum(lengths)
    unknown = _unknown_id(tokenizer)
    return Fit(
        rows=len(rows),
        tokens=tokens,
        supervised_tokens=sum(row.units for row in rows),
        longest=lengths[-1] if lengths else 0,
        median=lengths[len(lengths) // 2] if lengths else 0,
        mean=tokens / len(rows) if rows else 0.0,
        characters_per_token=sum(row.characters for row in rows) / tokens if tokens else 0.0,
        unknown_tokens=sum(row.ids.count(unknown) for row in rows) if unknown is not None else 0,
        dropped=len(whole.dropped) if whole else 0,
        truncated=sum(row.truncated for row in rows),
        special_tokens_in_text=len(whole.special_tokens_in_text) if whole else 0,
    )


def show_mask(row: Rendered, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The row as pieces of text, each with whether it is in the loss; joined they are the decoded row."""
    pieces: list[tuple[str, bool]] = []
    end, shown = 0, ""
    for supervised, run in groupby(row.supervised):
        end += len(list(run))
        # Decoding a run alone would lose the space that SentencePiece writes before its first word.
        text = str(tokenizer.decode(list(row.ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        pieces.append((text[len(shown) :], supervised))
        shown = text
    return pieces


def _unknown_id(tokenizer: Any) -> int | None:
    unknown: int | None = getattr(tokenizer, "unk_token_id", None)
    others = {getattr(tokenizer, name, None) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    return None if unknown in others else unknown
