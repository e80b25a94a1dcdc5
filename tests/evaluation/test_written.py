"""What an encoder-decoder writes is the likeliest text, whatever its own generation settings ask for."""

from __future__ import annotations

from typing import Any

import torch

from loratune.data.example import Place
from loratune.data.translated import Translated
from loratune.evaluation import tasks
from tests.families.zoo import built

SUMMARISER = {"min_length": 6, "no_repeat_ngram_size": 1, "repetition_penalty": 5.0, "num_beams": 3}


def written(model: Any) -> list[tuple[int, ...]]:
    ids, supervised = (9, 10, 11, *range(20, 28)), (False,) * 3 + (True,) * 8
    row = Translated(ids, supervised, Place("rows", 1), truncated=False, border=3)
    return tasks._written(model, [row], tasks.Asking(torch.device("cpu"), 0, 99, (), str))


def test_settings_of_a_summariser_change_nothing() -> None:
    model = built("bart")
    expected = written(model)
    assert len(set(expected[0])) < len(expected[0]), "it repeats itself, which a summariser may not"
    for name, value in SUMMARISER.items():
        setattr(model.generation_config, name, value)
    assert written(model) == expected
