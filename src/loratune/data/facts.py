"""What is told of a task's rows beside their lengths: counts of what they are about, and what one of them teaches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from loratune.data.labelled import Labelled, Labels
from loratune.data.located import Located
from loratune.data.render import Rendered, RenderedCorpus

# Of each label how many there are; of anything else its number.
Facts = dict[str, Any]
Decode = Callable[[Sequence[int]], str]


def no_facts(_: RenderedCorpus, __: Labels) -> Facts:
    return {}


def label_counts(corpus: RenderedCorpus, labels: Labels) -> Facts:
    """How often each label is there, in the order of their numbers; also those that are not."""
    counts = Counter(target for row in corpus.rows if isinstance(row, Labelled) for target in row.targets)
    return {"labels": {name: counts[number] for number, name in enumerate(labels)}}


def window_counts(corpus: RenderedCorpus, _: Labels) -> Facts:
    rows = [row for row in corpus.rows if isinstance(row, Located)]
    firsts = [row for row in rows if row.window == 0]
    return {
        "windows": len(rows),
        "in_several_windows": sum(row.window == 1 for row in rows),
        "without_answer": sum(not row.answers for row in firsts),
        "with_several_answers": sum(len(row.answers) > 1 for row in firsts),
    }


def not_said(_: Rendered, __: Labels, ___: Decode) -> str:
    """For rows whose supervised tokens say all that they teach."""
    return ""


def said_label(row: Labelled, labels: Labels, _: Decode) -> str:
    return labels[row.targets[0]]


def said_tags(row: Labelled, labels: Labels, decode: Decode) -> str:
    """Each word, as far as it was kept, with its tag."""
    begins = [at for at, first in enumerate(row.supervised) if first]
    ends = pairwise([*begins, len(row.ids)])
    words = [decode(row.ids[begin:end]).strip() for begin, end in ends]
    return " ".join(f"{word}/{labels[target]}" for word, target in zip(words, row.targets, strict=True))


def said_answer(row: Located, _: Labels, __: Decode) -> str:
    return row.said(*row.targets) or "no answer in this window"
