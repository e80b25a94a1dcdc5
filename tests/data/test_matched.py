"""Pairs: what a step's rows are compared with, whatever goes through the model at once; and what is wrong with rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import loratune as lt
from loratune.data.matched import MATCHED, MatchBatch, render_matched
from loratune.data.pack import Layout, batches
from loratune.data.read import read
from loratune.errors import DataError
from loratune.lora import TokenCounter
from loratune.loss import logits_of, summed_loss
from tests.models import encoder
from tests.tiny import tiny_tokenizer

ROWS = [
    {"anchor": "fine thank you", "positive": "Hello there"},
    {"anchor": "lazy dog", "positive": "stop"},
    {"anchor": "Paris", "positive": "The capital of France is Paris."},
    {"anchor": "the dog is lazy", "positive": "stop"},
]


def rendered(rows: list[Any] = ROWS, **settings: Any) -> Any:
    examples = read(rows, shapes=MATCHED).examples
    return render_matched(examples, tiny_tokenizer(None), **{"max_length": 64, **settings})


def batch_of(limit: int) -> MatchBatch:
    (made,) = batches(rendered().rows, Layout.PADDED, limit=limit, pad_id=2)
    assert isinstance(made, MatchBatch)
    return made


def alone(model: Any, ids: tuple[int, ...]) -> Tensor:
    hidden: Tensor = model(input_ids=torch.tensor([ids]))[0][0].double()
    mean = hidden.mean(0)
    return mean / mean.norm()


@pytest.mark.parametrize("limit", [20, 10_000])
def test_loss_is_that_of_texts_alone(limit: int) -> None:
    """InfoNCE written out, text by text; rows 2 and 4 have one answer, which is no wrong one of either."""
    model, rows = encoder(), rendered().rows
    expected = 0.0
    for i, row in enumerate(rows):
        others = [j for j, other in enumerate(rows) if j == i or other.match != row.match]
        scores = torch.stack([alone(model, row.asked) @ alone(model, rows[j].match) / 0.05 for j in others])
        expected -= float(scores.log_softmax(0)[others.index(i)])
    found = batch_of(limit)
    assert (found.supervised, found.examples) == (4, 4)
    assert float(summed_loss(model, found)) == pytest.approx(expected, rel=1e-4)
    assert logits_of(model, found).shape == (4, 4)
    assert logits_of(model, found)[1, 3] == logits_of(model, found)[3, 1] == -1e4


def test_gradients_do_not_depend_on_what_goes_through_at_once() -> None:
    """With dropout: what is computed again has the masks that it had."""
    model = encoder()
    torch.manual_seed(0)
    lora = lt.attach(model, lt.LoraConfig(r=4, lora_dropout=0.3, target_modules=("query", "value")))
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) or type(module).__name__.endswith("Attention"):
            module.training = False
    gradients = []
    for limit in (10_000, 20, 1):
        found = batch_of(limit)
        with lora.counting(TokenCounter(0, 0, found.tokens)):
            summed_loss(model, found).backward()
        gradients.append([parameter.grad.clone() for parameter in lora.parameters()])  # type: ignore[union-attr]
        model.zero_grad()
    assert max(float(g.abs().max()) for g in gradients[0]) > 1e-3
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-6)


def test_too_long_text_is_cut_on_its_own_side() -> None:
    rows = [{"query": "Hello " * 40, "positive": "stop"}, ROWS[0] | {"query": "a", "positive": "b"}]
    rows[1].pop("anchor")
    with pytest.raises(DataError, match=r"rows:1: .* longer than 8"):
        rendered(rows, max_length=8)
    first, second = rendered(rows, max_length=8, overlong="truncate").rows
    assert (len(first.asked), first.truncated, second.truncated) == (8, True, False)
    assert tiny_tokenizer(None).decode(list(first.match)) == "stop"


def test_bad_rows_are_reported_together() -> None:
    rows: list[Any] = [ROWS[0], {"anchor": "a"}, {"anchor": " ", "positive": "b"}, {"anchor": "a", "positive": 3}]
    with pytest.raises(DataError) as caught:
        read(rows, shapes=MATCHED)
    assert list(caught.value.problems) == [
        "rows:2: has no 'positive', which the other rows have (anchor/positive); it has 'anchor'",
        "rows:3: column 'anchor' is empty",
        "rows:4: column 'positive' is a number, expected a string",
    ]
