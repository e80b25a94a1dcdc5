"""Answers that stand in a context: which tokens they are, in which window, and what is wrong with rows."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from loratune.data.located import LOCATED, render_located, windows
from loratune.data.pack import Layout, Part, batches
from loratune.data.read import read
from loratune.errors import DataError
from loratune.loss import logits_of, summed_loss
from tests.families.zoo import built
from tests.models import encoder
from tests.tiny import tiny_tokenizer

CONTEXT = "The capital of France is Paris. The weather in 北京 is 21 degrees, good morning to the naïve café."


def row(question: str, *answers: str, context: str = CONTEXT) -> dict[str, Any]:
    starts = [context.index(answer) for answer in answers]
    return {"question": question, "context": context, "answers": {"text": list(answers), "answer_start": starts}}


ROWS = [
    row("What is the capital of France?", "Paris"),
    row("Where?", "北京", "in 北京"),
    row("Who?"),
    row("Which one", "the naïve café", context="Hello there! " * 3 + "the naïve café"),
]


def tokenizer() -> Any:
    return tiny_tokenizer(None, bos="<|begin_of_text|>", adds_bos=True)


def rendered(rows: list[Any] = ROWS, **settings: Any) -> Any:
    examples = read(rows, shapes=LOCATED).examples
    return render_located(examples, tokenizer(), **{"max_length": 128, **settings})


def test_tokens_of_an_answer_say_it() -> None:
    for made, source in zip(rendered().rows, ROWS, strict=True):
        first, last = made.targets
        answers = source["answers"]["text"]
        assert made.said(first, last) == (answers[0] if answers else "")
        assert made.answers == tuple(answers)
        assert made.supervised == tuple(first <= at <= last for at in range(len(made.ids)))
        if not answers:
            assert first == last == made.nowhere == 0
        whole = tokenizer()(source["question"], source["context"])["input_ids"]
        assert (list(made.ids), made.units, made.needed) == (whole, 2, len(whole))


@pytest.mark.parametrize("length", [40, 61, 100])
def test_windows_are_those_of_the_tokenizer(length: int) -> None:
    """Its own way to cut the second text, with the overlap that is used here."""
    source = row("Where is it?", "Paris", context=CONTEXT * 5)
    source["answers"]["answer_start"] = [source["context"].rindex("Paris")]
    made = rendered([source], max_length=length).rows
    whole = tokenizer()(source["question"], source["context"])
    around = sum(side != 1 for side in whole.sequence_ids(0))
    cut = tokenizer()(
        source["question"],
        source["context"],
        max_length=length,
        truncation="only_second",
        stride=(length - around) // 2,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert [list(one.ids) for one in made] == cut["input_ids"]
    assert len(made) > 1
    for number, one in enumerate(made):
        sides = zip(cut["offset_mapping"][number], cut.sequence_ids(number), strict=True)
        assert list(one.places) == [pair if side == 1 else None for pair, side in sides]
        assert one.window == number
        assert one.targets == (0, 0) or one.said(*one.targets) == "Paris"
    assert next(one.window for one in made if one.targets != (0, 0)) > 0


@pytest.mark.parametrize("room", [1, 2, 7, 300])
def test_windows_have_every_token_and_every_short_answer(room: int) -> None:
    for length in (1, room, room + 1, 5 * room + 3):
        found = windows(length, room)
        assert {at for begin, end in found for at in range(begin, end)} == set(range(length))
        assert max(end - begin for begin, end in found) <= room
        short = min(128, room // 2) + 1
        for first in range(length - short + 1):
            assert any(begin <= first and first + short <= end for begin, end in found)


@pytest.mark.parametrize("seed", range(20))
def test_any_characters_are_in_the_fewest_tokens(seed: int) -> None:
    """Answers that begin and end within tokens, and within characters of several tokens."""
    dice = random.Random(seed)
    first = dice.randrange(len(CONTEXT) - 1)
    answer = CONTEXT[first : first + dice.randint(1, 20)]
    if not answer.strip():
        return
    source = {"question": "Which?", "context": CONTEXT, "answer": answer, "answer_start": first}
    (made,) = rendered([source]).rows
    begin, last = made.targets
    assert answer.strip() in made.said(begin, last)
    characters = set(range(first, first + len(answer)))
    has = [bool(place and characters & set(range(*place))) for place in made.places]
    assert (has.index(True), len(has) - 1 - has[::-1].index(True)) == (begin, last)


@pytest.mark.parametrize("limit", [60, 10_000])
@pytest.mark.parametrize("family", ["bert", "deberta-v2", "gpt2", "llama"])
def test_loss_is_that_of_windows_alone(limit: int, family: str) -> None:
    """Against the loss that transformers computes of one window, the mean of its two ends'."""
    model = built(family, head="QuestionAnswering")
    rows = rendered(max_length=60).rows
    made = batches(rows, Layout.PADDED, limit=limit, pad_id=2)
    assert (len(made) > 1) == (limit == 60)
    expected = 0.0
    for one in rows:
        first, last = (torch.tensor([target]) for target in one.targets)
        found = model(input_ids=torch.tensor([one.ids]), start_positions=first, end_positions=last)
        expected += 2 * float(found.loss)
    assert sum(float(summed_loss(model, batch)) for batch in made) == pytest.approx(expected, rel=1e-5)
    assert sum(batch.supervised for batch in made) == 2 * len(rows) == sum(one.units for one in rows)


def test_pads_get_nothing() -> None:
    model, rows = encoder(kind="BertForQuestionAnswering"), rendered().rows
    (batch,) = batches(rows, Layout.PADDED, limit=10_000, pad_id=2)
    assert batch.attention_mask is not None
    logits = logits_of(model, batch)
    assert logits.shape == (2 * len(rows), batch.input_ids.shape[1])
    pads = ~batch.attention_mask.repeat_interleave(2, 0)
    assert pads.any()
    assert float(logits.softmax(-1)[pads].max()) < 1e-12
    for one in rows:
        row = next(i for i in range(len(rows)) if tuple(batch.input_ids[i, : len(one.ids)].tolist()) == one.ids)
        alone = model(input_ids=torch.tensor([one.ids]))
        for end, expected in enumerate((alone.start_logits, alone.end_logits)):
            torch.testing.assert_close(logits[2 * row + end, : len(one.ids)], expected[0], rtol=1e-4, atol=1e-5)


def test_parts_of_a_step_add_up() -> None:
    """Several processes: who has fewer rows repeats one that counts nothing."""
    model, rows = encoder(kind="BertForQuestionAnswering"), rendered(max_length=60).rows
    settings: dict[str, Any] = {"limit": 60, "pad_id": 2}
    whole = sum(float(summed_loss(model, batch)) for batch in batches(rows, Layout.PADDED, **settings))
    parts = [batches(rows, Layout.PADDED, part=Part(number, 2), **settings) for number in (0, 1)]
    assert len(parts[0]) == len(parts[1])
    assert sum(batch.supervised for part in parts for batch in part) == 2 * len(rows)
    assert sum(float(summed_loss(model, b)) for part in parts for b in part) == pytest.approx(whole, rel=1e-5)


def test_bad_rows_are_reported_together() -> None:
    good = ROWS[0]
    rows: list[Any] = [
        good,
        {"question": "a", "context": "b"},
        good | {"question": " "},
        good | {"context": 3},
        good | {"answers": {"text": ["Paris"], "answer_start": [24]}},
        good | {"answers": {"text": ["Berlin"], "answer_start": [25]}},
        good | {"answers": {"text": ["Paris"], "answer_start": [1000]}},
        good | {"answers": {"text": ["Paris", "France"], "answer_start": [25]}},
        good | {"answers": ["Paris"]},
        good | {"answers": None},
        good | {"answers": "none"},
        good | {"answers": {"text": ["Paris", 3, ""], "answer_start": [25, 0, 0]}},
        good | {"answers": {"text": ["Paris"], "answer_start": [None]}},
        good | {"answers": {"text": ["Paris"], "answer_start": [25 - len(CONTEXT)]}},
    ]
    with pytest.raises(DataError) as caught:
        read(rows, shapes=LOCATED)
    expected = "expected an object of two lists, text and answer_start"
    assert list(caught.value.problems) == [
        "rows:2: has no 'answers', which the other rows have (question/context/answers); it has 'context', 'question'",
        "rows:3: row without a question: it is empty",
        "rows:4: column 'context' is a number, expected a string",
        "rows:5: the answer, 'Paris', is not at character 24 of the context, which says ' Pari': it is at 25",
        "rows:6: the answer, 'Berlin', is not at character 25 of the context, which says 'Paris.': it is nowhere in it",
        "rows:7: the answer, 'Paris', is said to be at character 1000, and the context has 96: it is at 25",
        "rows:8: 2 texts and 1 starts in 'answers': each answer needs one",
        f"rows:9: column 'answers' is a list, {expected}",
        f"rows:10: column 'answers' is null, {expected}",
        "rows:11: column 'answers' is a string that is not valid JSON (Expecting value: line 1 column 1 (char 0))",
        "rows:12: answer 2 is a number, expected a part of the context",
        "rows:12: answer 3 is empty, expected a part of the context",
        "rows:13: answer_start of the answer is null, expected the number of a character",
        "rows:14: the answer, 'Paris', is said to be at character -71, and the context has 96: it is at 25",
    ]


def test_nearest_place_is_named() -> None:
    context = "one two one two one"
    rows = [{"question": "a", "context": context, "answer": "one", "answer_start": at} for at in (6, 15)]
    with pytest.raises(DataError) as caught:
        read(rows, shapes=LOCATED)
    assert [problem.rpartition(" ")[2] for problem in caught.value.problems] == ["8", "16"]


@pytest.mark.parametrize(("answer", "start"), [(None, None), ("", None), (" ", 3)])
def test_a_flat_row_without_an_answer(answer: Any, start: Any) -> None:
    made = read([{"question": "a", "context": CONTEXT, "answer": answer, "answer_start": start}], shapes=LOCATED)
    assert made.examples[0].spans == ()


@pytest.mark.parametrize("start", [25, 25.0, "25"])
def test_a_start_as_tables_have_it(start: Any) -> None:
    made = read([{"question": "a", "context": CONTEXT, "answer": "Paris", "answer_start": start}], shapes=LOCATED)
    assert made.examples[0].spans == ((25, 30),)


def test_what_does_not_fit() -> None:
    rows = [
        ROWS[0],
        row("Where is it? " * 12, "Paris"),
        row("Where is it? " * 4, "Paris"),
        row("Where?", (CONTEXT * 2)[:180], context=CONTEXT * 3),
    ]
    with pytest.raises(DataError) as caught:
        rendered(rows, max_length=60)
    *long, wide = caught.value.problems
    assert [problem.partition(" takes ")[0] for problem in long] == ["rows:2: its question", "rows:3: its question"]
    assert all(problem.endswith(" of 60 tokens") for problem in long)
    assert wide.startswith("rows:4: its answer of ")
    assert " is in no window of " in wide
    assert "--overlong drop" in str(caught.value.hint)
    with pytest.raises(DataError, match="rows:2: its question"):
        rendered(rows, max_length=60, overlong="truncate")
    found = rendered(rows, max_length=60, overlong="drop")
    assert [place.row for place in found.dropped] == [2, 3, 4]
    assert {one.place.row for one in found.rows} == {1}
    assert found.examples == 1


def test_what_a_row_answers_is_part_of_its_hash() -> None:
    hashes = {read([one], shapes=LOCATED).sha256 for one in (row("a", "Paris"), row("a", "France"), row("a"))}
    assert len(hashes) == 3


def test_rows_of_a_data_set_on_the_hub(tmp_path: Path) -> None:
    """As `datasets` has SQuAD's columns, and as files have them where a cell is a text."""
    import datasets

    data = datasets.Dataset.from_list([{"id": "x", **one} for one in ROWS])
    corpus = read(data, shapes=LOCATED)
    expected = read(ROWS, shapes=LOCATED)
    assert (corpus.sha256, corpus.shape) == (expected.sha256, "question/context/answers")
    assert (corpus.columns, corpus.ignored_columns) == (("answers", "context", "question"), ("id",))
    data.to_parquet(tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet", shapes=LOCATED).sha256 == expected.sha256
    texts = [{**one, "answers": json.dumps(one["answers"])} for one in ROWS]
    datasets.Dataset.from_list(texts).to_csv(tmp_path / "rows.csv")
    assert read(tmp_path / "rows.csv", shapes=LOCATED).sha256 == expected.sha256


def dressed(template: str) -> Any:
    """A tokenizer of words that says which text a token is of, and puts its own tokens where the template has them."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(re.findall(r"\w+|[^\w\s]", CONTEXT))]
    made = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(name, names.index(name)) for name in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(single="$A", pair=template, special_tokens=special)
    own = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=["input_ids", "token_type_ids"], **own)


@pytest.mark.parametrize(
    ("template", "nowhere"),
    [("[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", 0), ("$A:0 [SEP]:0 $B:1 [SEP]:1 [CLS]:2", -1)],
)
def test_tokens_of_the_tokenizers_own(template: str, nowhere: int) -> None:
    """As BERT puts them, and as XLNet does: each window has them all, and which text each token is of."""
    tokenizer = dressed(template)
    examples = read([row("the capital of", "café"), row("the capital of")], shapes=LOCATED).examples
    made = render_located(examples, tokenizer, max_length=18).rows
    assert all(one.nowhere == len(one.ids) - 1 if nowhere else one.nowhere == 0 for one in made)
    assert [one.said(*one.targets) for one in made] == ["", "", "café", "", "", ""]
    assert {one.targets for one in made if not one.answers} == {(one.nowhere, one.nowhere) for one in made[3:]}
    cut = tokenizer(
        "the capital of",
        CONTEXT,
        max_length=18,
        truncation="only_second",
        stride=(18 - 6) // 2,
        return_overflowing_tokens=True,
    )
    assert [list(one.types) for one in made[:3]] == cut["token_type_ids"]
    model = encoder(kind="BertForQuestionAnswering", type_vocab_size=3)
    (batch,) = batches(made[:1], Layout.PADDED, limit=99, pad_id=0)
    ids, types = torch.tensor([made[0].ids]), torch.tensor([made[0].types])
    expected = model(input_ids=ids, token_type_ids=types).start_logits[0]
    torch.testing.assert_close(logits_of(model, batch)[0], expected)
    assert not torch.allclose(model(input_ids=ids).start_logits[0], expected)


def test_other_names_are_suggested() -> None:
    with pytest.raises(DataError) as caught:
        read([{"question": "a", "passage": "b", "answers": {"text": [], "answer_start": []}}], shapes=LOCATED)
    assert caught.value.hint == "name them: --columns context=passage"
