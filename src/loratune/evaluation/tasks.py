"""What is measured of each task on held-out rows beside the loss, and how an answer reads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from loratune.data.example import Place
from loratune.data.labelled import Labelled, Labels
from loratune.data.located import Located
from loratune.data.matched import Matched, TwoTexts, stack_matched
from loratune.data.pack import one_batch
from loratune.data.render import Rendered
from loratune.data.translated import Translated, stack_translated
from loratune.evaluation.labels import accuracy, macro_f1, majority
from loratune.evaluation.located import of_best, same_words, word_f1
from loratune.evaluation.spans import span_f1
from loratune.loss import logits_of, vectors_of
from loratune.model import evaluating

Row = TypeVar("Row", bound=Rendered)


@dataclass(frozen=True, slots=True)
class Asking:
    """How a model is asked about rows: where, with which pad, and with how many tokens at once."""

    device: torch.device
    pad_id: int
    limit: int
    labels: Labels
    decode: Callable[[Sequence[int]], str]


# What a model says of a row: the numbers of its labels; or the nearest row's, and its own one's rank; or which window
# has the answer, and its first and last token.
Said = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Measure:
    """What is measured of one task.

    Attributes:
        ask: the model's answers to rows, in their order.
        score: metrics by name of these answers, the first the one to look at.
        words: an answer as text, by all rows that were asked about. reference: what it should have been.
    """

    ask: Callable[[nn.Module, Sequence[Any], Asking], list[Said]]
    score: Callable[[Sequence[Said], Sequence[Any], Labels], dict[str, float]]
    words: Callable[[Said, Sequence[Any], Asking], str]
    reference: Callable[[Any, Asking], str]

    def metrics(self, model: nn.Module, rows: Sequence[Rendered], asking: Asking) -> dict[str, float]:
        return self.score(self.ask(model, rows, asking), rows, asking.labels)


@torch.no_grad()
def _choices(model: nn.Module, rows: Sequence[Rendered], asking: Asking) -> list[Said]:
    """The likeliest label wherever a row has a target."""
    found: list[Said] = []
    with evaluating(model):
        for some in _together(rows, asking.limit):
            batch = one_batch(some, packed=False, pad_id=asking.pad_id).to(asking.device)
            chosen = iter(logits_of(model, batch).argmax(-1).tolist())
            found += [tuple(next(chosen) for _ in range(row.units)) for row in some]
    return found


def _together(rows: Sequence[Row], limit: int) -> list[list[Row]]:
    """Neighbours, as many as `limit` tokens hold with their pads; a longer row goes alone."""
    groups: list[list[Row]] = []
    for row in rows:
        if groups and max(one.needed for one in (*groups[-1], row)) * (len(groups[-1]) + 1) <= limit:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _labels_told(said: Sequence[Said], rows: Sequence[Labelled], _: Labels) -> dict[str, float]:
    told, true = ([label for row in some for label in row] for some in (said, [row.targets for row in rows]))
    return {"accuracy": accuracy(told, true), "macro_f1": macro_f1(told, true), "majority": majority(true)}


def _words_told(said: Sequence[Said], rows: Sequence[Labelled], labels: Labels) -> dict[str, float]:
    named = [[[labels[number] for number in row] for row in some] for some in (said, [row.targets for row in rows])]
    return {"span_f1": span_f1(*named), **_labels_told(said, rows, labels)}


def _named(said: Said, _: Sequence[Labelled], asking: Asking) -> str:
    return " ".join(asking.labels[number] for number in said)


def _true_name(row: Labelled, asking: Asking) -> str:
    return _named(row.targets, (), asking)


@torch.no_grad()
def _nearest(model: nn.Module, rows: Sequence[Matched], asking: Asking) -> list[Said]:
    """Of each row, which row's second text is nearest to its first one, and the rank of its own among the others."""
    batch = stack_matched(rows, pad_id=asking.pad_id, starts=[0] * len(rows), at_once=asking.limit)
    with evaluating(model):
        first, second = vectors_of(model, batch.to(asking.device)).chunk(2)
    found: list[Said] = []
    for number, vector in enumerate(first):
        near = second @ vector
        # Texts that several rows have count once, and a row's own is the same wherever it stands.
        # As near as its own is before it: a model that tells nothing apart finds nothing. Neither does one of NaN.
        before = ~(near < near[number])
        better = {rows[i].match for i in before.nonzero()[:, 0].tolist()} - {rows[number].match}
        found.append((int(near.argmax()), 1 + len(better)))
    return found


def _ranks(said: Sequence[Said], _: Sequence[Matched], __: Labels) -> dict[str, float]:
    """How often the own text is the nearest, and the mean of one over its rank."""
    ranks = [rank for _, rank in said]
    first = sum(rank == 1 for rank in ranks) / len(ranks)
    return {"recall_at_1": first, "mrr": sum(1 / rank for rank in ranks) / len(ranks)}


def _nearest_text(said: Said, rows: Sequence[Matched], asking: Asking) -> str:
    return asking.decode(rows[said[0]].match)


def _own_text(row: TwoTexts, asking: Asking) -> str:
    return asking.decode(row.match)


# Whatever a model's own settings ask for: a summariser's forbid short texts and repeats.
_LIKELIEST: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
}


@torch.no_grad()
def _written(model: Any, rows: Sequence[Translated], asking: Asking) -> list[Said]:
    """The likeliest tokens one after the other, up to the end of the text that the model writes."""
    ends = {end for row in rows for end in row.match[-1:]}
    most = max(row.units for row in rows)
    found: list[Said] = []
    with evaluating(model):
        for some in _together(rows, asking.limit):
            batch = stack_translated(some, pad_id=asking.pad_id).to(asking.device)
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            made = model.generate(**inputs, max_new_tokens=most, **_LIKELIEST)
            found += [_ended(ids, ends) for ids in made[:, 1:].tolist()]  # after the token that it begins with
    return found


def _ended(ids: Sequence[int], ends: Collection[int]) -> Said:
    stop = next((at + 1 for at, number in enumerate(ids) if number in ends), len(ids))
    return tuple(ids[:stop])


def _exact(said: Sequence[Said], rows: Sequence[Translated], _: Labels) -> dict[str, float]:
    return {"exact_match": sum(ids == row.match for ids, row in zip(said, rows, strict=True)) / len(rows)}


def _read(said: Said, _: Sequence[Translated], asking: Asking) -> str:
    return asking.decode(said)


@torch.no_grad()
def _located(model: nn.Module, rows: Sequence[Located], asking: Asking) -> list[Said]:
    """Of each window the answer to its question: the likeliest span of all windows of its context.

    Nothing is an answer where some of the rows have none: it is told where the first token is likelier than the best
    span, in whichever window it is least likely (Devlin et al., "BERT", 2019, section 4.3, with a threshold of 0).
    """
    best: dict[Place, tuple[float, Said]] = {}
    nowhere: dict[Place, float] = {}
    silent = any(not row.answers for row in rows)
    number = 0
    with evaluating(model):
        for some in _together(rows, asking.limit):
            batch = one_batch(some, packed=False, pad_id=asking.pad_id).to(asking.device)
            for row, ends in zip(some, logits_of(model, batch).float().cpu().unflatten(0, (-1, 2)), strict=True):
                score, first, last = _likeliest(row, ends)
                if row.place not in best or score > best[row.place][0]:
                    best[row.place] = score, (number, first, last)
                nowhere[row.place] = min(nowhere.get(row.place, torch.inf), float(ends[:, row.nowhere].sum()))
                number += 1
    nothing = {place for place, score in nowhere.items() if silent and score > best[place][0]}
    return [
        (number, row.nowhere, row.nowhere) if row.place in nothing else best[row.place][1]
        for number, row in enumerate(rows)
    ]


def _likeliest(row: Located, ends: Tensor) -> tuple[float, int, int]:
    """The span of the context with the largest sum of two logits, its first not after its last: (sum, first, last).

    Args:
        ends: (2, T), how likely each token is the first one and the last one.
    """
    outside = torch.tensor([place is None for place in row.places])
    begin, end = ends[:, : len(outside)].masked_fill(outside, -torch.inf)
    so_far, where = begin.cummax(0)
    score, last = (so_far + end).max(0)
    return float(score), int(where[last]), int(last)


def _answers_told(said: Sequence[Said], rows: Sequence[Located], _: Labels) -> dict[str, float]:
    """Of rows, not of windows. Beside it the better of saying nothing and all of the context, which needs no model."""
    firsts = [number for number, row in enumerate(rows) if row.window == 0]
    told, right = [_span(said[number], rows) for number in firsts], [rows[number].answers for number in firsts]
    trivial = [[""] * len(firsts), [rows[number].context for number in firsts]]
    return {
        "f1": of_best(word_f1, told, right),
        "exact_match": of_best(same_words, told, right),
        "trivial_f1": max(of_best(word_f1, one, right) for one in trivial),
    }


def _span(said: Said, rows: Sequence[Located], _: Asking | None = None) -> str:
    number, first, last = said
    return rows[number].said(first, last)


def _right_answer(row: Located, _: Asking) -> str:
    return row.answers[0] if row.answers else ""


# A causal LM's answers are written, not chosen: the engine asks for them.
MEASURES: Mapping[str, Measure] = {
    "SEQ_CLS": Measure(_choices, _labels_told, _named, _true_name),
    "TOKEN_CLS": Measure(_choices, _words_told, _named, _true_name),
    "QUESTION_ANS": Measure(_located, _answers_told, _span, _right_answer),
    "SEQ_2_SEQ_LM": Measure(_written, _exact, _read, _own_text),
    "FEATURE_EXTRACTION": Measure(_nearest, _ranks, _nearest_text, _own_text),
}
