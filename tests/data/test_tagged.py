"""Words with tags: which token has which, and what is wrong with rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loratune.data.labelled import label_names
from loratune.data.pack import Layout, Part, batches
from loratune.data.read import read
from loratune.data.tagged import TAGGED, render_tagged
from loratune.errors import DataError
from loratune.loss import summed_loss
from tests.models import encoder
from tests.tiny import tiny_tokenizer

ROWS = [
    {"tokens": ["The", "naïve", "café", "stop"], "tags": ["O", "B-x", "I-x", "O"]},
    {"tokens": ["Berlin"], "tags": ["B-x"]},
    {"tokens": ["北京", "Paris", "21"], "tags": ["B-x", "I-x", "O"]},
]
LABELS = ("B-x", "I-x", "O")


def tokenizer() -> Any:
    made = tiny_tokenizer(None, bos="<|begin_of_text|>", adds_bos=True)
    made.add_prefix_space = True
    return made


def rendered(rows: list[Any], **settings: Any) -> Any:
    examples = read(rows, shapes=TAGGED).examples
    return render_tagged(examples, tokenizer(), labels=LABELS, **{"max_length": 64, **settings})


def test_first_token_of_a_word_has_its_tag() -> None:
    made = tokenizer()
    for row, source in zip(rendered(ROWS).rows, ROWS, strict=True):
        assert [LABELS[target] for target in row.targets] == source["tags"]
        assert row.units == len(source["tokens"]) == sum(row.supervised)
        assert not row.supervised[0], "the tokenizer's own token is of no word"
        begins = [at for at, first in enumerate(row.supervised) if first]
        ends = [*begins[1:], len(row.ids)]
        words = [made.decode(list(row.ids[a:b])).strip() for a, b in zip(begins, ends, strict=True)]
        assert words == source["tokens"]


def test_cut_row_keeps_the_words_that_are_left() -> None:
    whole, cut = rendered(ROWS).rows[0], rendered(ROWS, max_length=7, overlong="truncate").rows[0]
    assert cut.truncated
    assert cut.ids == whole.ids[:7]
    assert cut.targets == whole.targets[: sum(whole.supervised[:7])]


@pytest.mark.parametrize("limit", [12, 10_000])
def test_loss_is_that_of_words_in_rows_alone(limit: int) -> None:
    model = encoder(kind="BertForTokenClassification", num_labels=3)
    rows = rendered(ROWS).rows
    total = sum(float(summed_loss(model, batch)) for batch in batches(rows, Layout.PADDED, limit=limit, pad_id=2))
    expected = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
        at = [i for i, first in enumerate(row.supervised) if first]
        expected -= sum(float(logits[i, target]) for i, target in zip(at, row.targets, strict=True))
    assert total == pytest.approx(expected, rel=1e-5)


def test_bad_rows_are_reported_together() -> None:
    rows: list[Any] = [
        ROWS[0],
        {"tokens": ["a", "b"], "tags": ["O"]},
        {"tokens": "a b", "tags": ["O", "O"]},
        {"tokens": [], "tags": []},
        {"tokens": ["a", 3], "tags": ["O", None]},
    ]
    with pytest.raises(DataError) as caught:
        read(rows, shapes=TAGGED)
    assert list(caught.value.problems) == [
        "rows:2: 2 words in 'tokens' and 1 tags in 'tags': each word needs one",
        "rows:3: column 'tokens' is a string, expected a list of one entry a word",
        "rows:4: row without a word: 'tokens' is empty",
        "rows:5: word 2 in 'tokens' is a number, expected a word",
        "rows:5: tag 2 in 'tags' is null, expected the name of a class or its whole number",
    ]
    with pytest.raises(DataError, match="rows:1: label 'B-y' is none of"):
        rendered([{"tokens": ["a"], "tags": ["B-y"]}])


def test_names_of_a_data_set_on_the_hub_are_read() -> None:
    import datasets

    names = datasets.ClassLabel(names=["O", "B-x", "I-x"])
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(names)})
    data = datasets.Dataset.from_dict({"tokens": [["a", "b"]], "ner_tags": [[1, 0]]}, features=features)
    corpus = read(data, shapes=TAGGED)
    assert (corpus.shape, corpus.examples[0].labels) == ("tokens/ner_tags", ("B-x", "O"))
    assert label_names(corpus.examples) == ("B-x", "O")


def test_parts_of_a_step_add_up() -> None:
    """Several processes: who has fewer rows repeats one that counts nothing."""
    model, rows = encoder(kind="BertForTokenClassification", num_labels=3), rendered(ROWS).rows
    settings: dict[str, Any] = {"limit": 14, "pad_id": 2}
    whole = sum(float(summed_loss(model, batch)) for batch in batches(rows, Layout.PADDED, **settings))
    parts = [batches(rows, Layout.PADDED, part=Part(number, 2), **settings) for number in (0, 1)]
    assert len(parts[0]) == len(parts[1])
    assert sum(batch.supervised for part in parts for batch in part) == sum(row.units for row in rows)
    assert sum(float(summed_loss(model, b)) for part in parts for b in part) == pytest.approx(whole, rel=1e-5)
