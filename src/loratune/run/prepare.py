"""From a data file to rows of token ids: what `train`, `data` and `plan` have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.data.example import Corpus, Example
from loratune.data.facts import Facts
from loratune.data.fit import Fit, fit
from loratune.data.labelled import LABELLED, only_held_out
from loratune.data.read import read
from loratune.data.render import Rendered, RenderedCorpus
from loratune.data.split import Split, split
from loratune.data.tasks import DATA_TASKS, DataTask
from loratune.errors import ConfigError
from loratune.model import LANGUAGE_MODEL, Head
from loratune.run.decide import Decisions, decide_length, decide_val

_SHOWN = 8


@dataclass(frozen=True)
class Rows:
    """What to train on, and what to validate on where that is not for the setting `val` to say."""

    data: Any
    held_out: Any = None


@dataclass(frozen=True)
class Prepared:
    """A corpus, split and rendered. `fit` describes the training rows, `head` what they teach."""

    corpus: Corpus
    split: Split
    train: RenderedCorpus
    val: RenderedCorpus | None
    fit: Fit
    head: Head = LANGUAGE_MODEL

    @property
    def rows(self) -> tuple[Rendered, ...]:
        return self.train.rows

    @property
    def facts(self) -> Facts:
        """What the training rows are about, as their task counts it."""
        return DATA_TASKS[self.head.task].facts(self.train, self.head.labels)

    @property
    def unseen(self) -> tuple[Example, ...]:
        """Held-out examples where there are some, else the training ones: what samples are taken of."""
        return self.split.val or self.split.train


def prepare(
    rows: Rows, decisions: Decisions, tokenizer: Any, context: int | None, head: Head = LANGUAGE_MODEL
) -> Prepared:
    """Read, hold out, render; every bad row of the file is reported at once."""
    task = DATA_TASKS[head.task]
    corpus = read(rows.data, columns=decisions["columns"], shapes=task.shapes)
    held_out = split(corpus, _validation(rows.held_out, decisions, len(corpus), task), decisions["seed"])
    settings = {
        "loss": decisions["loss"],
        "labels": head.labels,
        "max_length": decide_length(decisions, context),
        "overlong": decisions["overlong"],
    }
    train = task.rows(held_out.train, tokenizer, **settings)
    rendered_val = task.rows(held_out.val, tokenizer, **settings) if held_out.val else None
    return Prepared(corpus, held_out, train, rendered_val, fit(train, tokenizer), head)


def _validation(held_out: Any, decisions: Decisions, rows: int, task: DataTask) -> Any:
    """A share, a count or a corpus."""
    columns = decisions["columns"]
    if held_out is None:
        val = decide_val(decisions, rows)
        return read(Path(val), columns=columns, shapes=task.shapes) if isinstance(val, str) else val
    if decisions.values.get("val") is not None:
        raise ConfigError("val and held_out both say what is held out", hint="give one of them")
    corpus = read(held_out, columns=columns, shapes=task.shapes)
    decisions.decide("val", len(corpus), "rows of their own")
    return corpus


def data_line(prepared: Prepared) -> str:
    """The data in one line, as the first line of a run's screen."""
    train, numbers = prepared.train, prepared.fit
    parts = [f"{len(prepared.corpus):,} rows · {prepared.corpus.shape}"]
    if prepared.split.val:
        parts.append(f"{len(prepared.split.val)} held out")
    for word, rows in (("truncated", train.truncated), ("dropped", train.dropped)):
        if rows:
            parts.append(f"{len(rows)} {word} ({_first(rows)})")
    if prepared.split.duplicates:
        parts.append(f"{len(prepared.split.duplicates)} held-out rows also in training")
    parts.append(_taught(prepared))
    parts.append(f"fit {numbers.characters_per_token:.1f} characters a token")
    if numbers.unknown_tokens:
        parts.append(f"{numbers.unknown_tokens} unknown tokens")
    if numbers.special_tokens_in_text:
        parts.append(f"special tokens written in {numbers.special_tokens_in_text} rows")
    return " · ".join(parts)


def _taught(prepared: Prepared) -> str:
    """How much of the rows is in the loss, or how many labels they have."""
    numbers, labels = prepared.fit, prepared.head.labels
    if prepared.head == LANGUAGE_MODEL and prepared.corpus.shape == LABELLED[0].name:
        return f"labels are written as answers (--task SEQ_CLS: chosen), {numbers.supervised_share:.0%} supervised"
    unit = DATA_TASKS[prepared.head.task].unit
    if unit == "tokens":
        return f"{numbers.supervised_share:.0%} of {numbers.tokens:,} tokens supervised"
    if not labels:
        counts = [f"{count:,} {name.replace('_', ' ')}" for name, count in prepared.facts.items() if count]
        return " · ".join([f"{numbers.supervised_tokens:,} {unit} to learn", *counts])
    shown = ", ".join(labels[:_SHOWN]) + (", …" if len(labels) > _SHOWN else "")
    rare = only_held_out(prepared.split.train, prepared.split.val)
    words = f"{numbers.supervised_tokens:,} {unit} of {len(labels)} labels ({shown})"
    return words + (f", of which only held-out rows have {', '.join(rare)}" if rare else "")


def _first(rows: Any, shown: int = 3) -> str:
    return "rows " + ", ".join(str(place.row) for place in rows[:shown]) + (", …" if len(rows) > shown else "")
