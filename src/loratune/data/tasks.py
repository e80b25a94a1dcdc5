"""What rows are for each task: which columns they have, what is read of them, and what a step's loss is a mean over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loratune.data.example import Corpus, Example, Place
from loratune.data.facts import (
    Decode,
    Facts,
    label_counts,
    no_facts,
    not_said,
    said_answer,
    said_label,
    said_tags,
    window_counts,
)
from loratune.data.labelled import LABELLED, Labelled, Labels, label_names, render_labelled
from loratune.data.located import LOCATED, Located, render_located
from loratune.data.matched import MATCHED, Matched, render_matched
from loratune.data.render import Rendered, RenderedCorpus, render
from loratune.data.shapes import SHAPES, Shape
from loratune.data.tagged import TAGGED, render_tagged
from loratune.data.tokens import Tokenizer
from loratune.data.translated import TRANSLATED, Translated, render_translated

# Settings that only say something about rows that go on with the next token.
_OF_NEXT_TOKENS = ("loss", "pack", "share_prefixes", "group_prefixes")


@dataclass(frozen=True, slots=True)
class DataTask:
    """The rows of one task.

    Attributes:
        shapes: the columns that they may have.
        unit: what a step's loss is the mean over, in the plural.
        render: `(examples, tokenizer, max_length=, overlong=, …)` to token ids and what they teach.
        takes: which of `labels` and `loss` it is told, too.
        labels: the names that the rows have between them; none where they have no labels.
        probe: a row of these token ids, to look at what a model makes of it.
        packed: whether rows may stand side by side. writes: whether rows end with a token to stop at.
        counted: whether all modules see the tokens that dropout's masks are counted by: a decoder sees others.
        meaningless: settings that say nothing here.
        facts: what is counted of rendered rows. said: what a row teaches, where its supervised tokens do not say it.
    """

    shapes: tuple[Shape, ...]
    unit: str
    render: Callable[..., RenderedCorpus]
    takes: tuple[str, ...]
    labels: Callable[[Corpus], Labels]
    probe: Callable[[tuple[int, ...]], Rendered]
    packed: bool = False
    writes: bool = False
    counted: bool = True
    meaningless: tuple[str, ...] = _OF_NEXT_TOKENS
    facts: Callable[[RenderedCorpus, Labels], Facts] = no_facts
    said: Callable[[Any, Labels, Decode], str] = not_said

    def rows(
        self, examples: Iterable[Example], tokenizer: Tokenizer, *, max_length: int, overlong: str, **told: Any
    ) -> RenderedCorpus:
        """The examples as token ids; `told` has everything that any task's rendering takes."""
        own = {name: told[name] for name in self.takes}
        return self.render(examples, tokenizer, max_length=max_length, overlong=overlong, **own)


def _no_labels(_: Corpus) -> Labels:
    return ()


def _names(corpus: Corpus) -> Labels:
    return label_names(corpus.examples)


_PLACE = Place("probe", 1)

DATA_TASKS: Mapping[str, DataTask] = {
    "CAUSAL_LM": DataTask(
        SHAPES,
        "tokens",
        render,
        ("loss",),
        _no_labels,
        lambda ids: Rendered(ids, (False, *[True] * (len(ids) - 1)), _PLACE, False),
        packed=True,
        writes=True,
        meaningless=(),
    ),
    "SEQ_CLS": DataTask(
        LABELLED,
        "rows",
        render_labelled,
        ("labels",),
        _names,
        lambda ids: Labelled(ids, (False,) * len(ids), _PLACE, False, targets=(0,)),
        facts=label_counts,
        said=said_label,
    ),
    "TOKEN_CLS": DataTask(
        TAGGED,
        "words",
        render_tagged,
        ("labels",),
        _names,
        lambda ids: Labelled(ids, (True,) * len(ids), _PLACE, False, targets=(0,) * len(ids)),
        facts=label_counts,
        said=said_tags,
    ),
    "QUESTION_ANS": DataTask(
        LOCATED,
        "ends",
        render_located,
        (),
        _no_labels,
        lambda ids: Located(ids, (False,) * len(ids), _PLACE, False, targets=(0, 0)),
        facts=window_counts,
        said=said_answer,
    ),
    "FEATURE_EXTRACTION": DataTask(
        MATCHED,
        "pairs",
        render_matched,
        (),
        _no_labels,
        lambda ids: Matched(ids + ids, (False,) * len(ids) + (True,) * len(ids), _PLACE, False, border=len(ids)),
    ),
    "SEQ_2_SEQ_LM": DataTask(
        TRANSLATED,
        "tokens",
        render_translated,
        (),
        _no_labels,
        lambda ids: Translated(ids + ids, (False,) * len(ids) + (True,) * len(ids), _PLACE, False, border=len(ids)),
        writes=True,
        counted=False,
    ),
}


# What a bare encoder can be trained for: the rows say which.
OPEN = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


def task_of_shape(name: str) -> str:
    """The task that rows of this shape are for, where the model leaves it open."""
    return next(task for task in OPEN if name in {shape.name for shape in DATA_TASKS[task].shapes})
