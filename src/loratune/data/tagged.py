"""Words with a tag each: from rows to token ids and the numbers of the tags.

A word may become several tokens. The first one has its tag, the others teach nothing (Devlin et al., "BERT", 2019,
section 5.3), so that a step's loss is the mean over words, however a tokenizer cuts them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loratune.data.example import Example, Place
from loratune.data.labelled import Labelled, Labels, Sorting, in_batches, label_of
from loratune.data.messages import checked_text, kind
from loratune.data.render import Overlong, Rendered, RenderedCorpus
from loratune.data.shapes import Shape
from loratune.data.tokens import Tokenizer
from loratune.errors import DataError


def _words_tags(place: Place, row: Mapping[str, Any], problems: list[str], column: str) -> Example:
    lists = {name: row[name] for name in ("tokens", column)}
    wrong = [name for name, value in lists.items() if not isinstance(value, list | tuple)]
    problems += [f"column {name!r} is {kind(lists[name])}, expected a list of one entry a word" for name in wrong]
    if wrong:
        return Example(place, "tagged")
    words, tags = lists.values()
    if not words:
        problems.append("row without a word: 'tokens' is empty")
    if len(words) != len(tags):
        problems.append(f"{len(words)} words in 'tokens' and {len(tags)} tags in {column!r}: each word needs one")
    texts = tuple(_word(word, number, problems) for number, word in enumerate(words, 1))
    labels = tuple(label_of(tag, f"tag {number} in {column!r}", problems) for number, tag in enumerate(tags, 1))
    return Example(place, "tagged", texts=texts, labels=labels)


def _word(value: object, number: int, problems: list[str]) -> str:
    if not isinstance(value, str) or not value.strip():
        shown = "empty" if isinstance(value, str) else kind(value)
        problems.append(f"word {number} in 'tokens' is {shown}, expected a word")
        return ""
    return checked_text(value, f"word {number} in 'tokens'", problems)


def _shape(column: str) -> Shape:
    return Shape(
        f"tokens/{column}",
        ("tokens", column),
        (),
        lambda place, row, problems: _words_tags(place, row, problems, column),
    )


# The second is what CoNLL's data sets call their columns.
TAGGED = (_shape("tags"), _shape("ner_tags"))


def render_tagged(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    *,
    labels: Labels,
    max_length: int,
    overlong: Overlong = "error",
) -> RenderedCorpus:
    """Token ids of all examples, with each word's tag at its first token.

    Args:
        labels: the tags' names by number.
        overlong: a longer row is an error, is dropped, or is truncated: its last words are cut.

    Raises:
        DataError: a tokenizer that does not say which word a token is of; tags that are none of these, words of which
            no token is left, rows that are too long, or nothing left. All rows at once.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError("the tokenizer does not say which word a token is of", hint="use a model with a fast tokenizer")
    sorting = _TagSorting(tokenizer, labels, max_length, overlong)
    for some in in_batches(examples):
        sorting.add(some, [_encoded(tokenizer, example) for example in some])
    return sorting.finished()


class _TagSorting(Sorting):
    def row(self, example: Example, made: Mapping[str, Any]) -> Rendered:
        cut = len(made["input_ids"]) > self.max_length
        if cut:
            made = _encoded(self.tokenizer, example, truncation=True, max_length=self.max_length)
        ids = tuple(made["input_ids"])
        words = made["words"]
        first = [word is not None and word not in words[:at] for at, word in enumerate(words)]
        kept = [word for word, counts in zip(words, first, strict=True) if counts]
        if not cut and len(kept) < len(example.texts):
            lost = next(number for number in range(len(example.texts)) if number not in kept)
            self.problems.append((example.place, f"word {lost + 1}, {example.texts[lost]!r}, has no token"))
            self.hints["remove words that the tokenizer leaves nothing of"] = None
        targets = tuple(self.numbers[example.labels[word]] for word in kept)
        return Labelled(ids, tuple(first), example.place, cut, sum(map(len, example.texts)), targets)


def _encoded(tokenizer: Tokenizer, example: Example, **options: Any) -> dict[str, Any]:
    made = tokenizer([list(example.texts)], is_split_into_words=True, verbose=False, **options)
    return {"input_ids": made["input_ids"][0], "words": made.word_ids(0)}
