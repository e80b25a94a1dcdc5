"""One token a row: by its own settings and generator, whatever stands beside it and however extreme the logits are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from loratune.engine.choose import GREEDY, Sampling, choose
from loratune.errors import ConfigError


def logits_of(rows: int, vocabulary: int = 50, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def dice_of(*seeds: int) -> list[torch.Generator | None]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


WAYS = [Sampling(temperature=1.0), Sampling(temperature=0.7, top_p=0.6), Sampling(temperature=1.3, top_p=1e-6), GREEDY]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("way", WAYS)
def test_a_broken_row_is_told_and_the_others_choose_what_they_choose_alone(poison: float, way: Sampling) -> None:
    logits = logits_of(len(WAYS) + 1)
    logits[2, 7] = poison
    ways = [*WAYS[:2], way, *WAYS[2:]]
    tokens, sound = choose(logits, ways, dice_of(*range(5)))
    assert sound.tolist() == [True, True, False, True, True]
    for row in (0, 1, 3, 4):
        alone, _ = choose(logits[row : row + 1], [ways[row]], dice_of(row))
        assert tokens[row] == alone[0]
    assert 0 <= int(tokens[2]) < 50


@pytest.mark.parametrize("way", WAYS)
def test_tokens_that_a_model_forbids_are_never_chosen_and_break_nothing(way: Sampling) -> None:
    logits = logits_of(1)
    logits[:, ::2] = -math.inf
    logits[:, 40:] = -math.inf
    for seed in range(200):
        tokens, sound = choose(logits, [way], dice_of(seed))
        assert sound.tolist() == [True]
        assert tokens[0] % 2 == 1
        assert tokens[0] < 40
    _, sound = choose(torch.full((1, 50), -math.inf), [way], dice_of(0))
    assert sound.tolist() == [False]


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.1, 0.0])
@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-6, 1e-5])
def test_a_temperature_near_zero_takes_the_likeliest(temperature: float, top_p: float) -> None:
    logits = torch.cat([logits_of(1), logits_of(1) * 1e37, logits_of(1) - 1e38])
    logits[2, 9] = -9e37
    way = Sampling(temperature=temperature, top_p=top_p)
    tokens, sound = choose(logits, [way] * 3, dice_of(1, 2, 3))
    assert sound.all()
    assert tokens.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_follow_the_distribution_and_the_nucleus(dtype: torch.dtype) -> None:
    logits = (logits_of(1, 40, seed=3) / 2).to(dtype)
    p = (logits.double() / 0.8).softmax(-1)[0]
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(0) < 0.75).sum()) + 1]
    nucleus = torch.zeros_like(p).index_put((kept,), p[kept] / p[kept].sum())
    draws = 6000
    for top_p, expected in ((1.0, p), (0.75, nucleus)):
        way, counts, (dice,) = Sampling(temperature=0.8, top_p=top_p), torch.zeros(40), dice_of(0)
        for _ in range(draws):
            counts[choose(logits, [way], [dice])[0]] += 1
        spread = (draws * expected * (1 - expected)).sqrt()
        assert ((counts - draws * expected).abs() <= 4.5 * spread + 1).all()
        assert (counts[expected == 0] == 0).all()


def test_equal_tokens_in_another_order_are_drawn_alike() -> None:
    """Which of two nearly equal tokens is the likelier changes with rounding; what is drawn hardly does."""
    logits = torch.zeros(1, 20)
    other = logits + torch.randn(1, 20, generator=torch.Generator().manual_seed(1)) * 1e-6
    way = Sampling(temperature=1.0, top_p=0.999)
    for seed in range(100):
        assert choose(logits, [way], dice_of(seed))[0] == choose(other, [way], dice_of(seed))[0]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: at least 1"),
        ({"temperature": -0.1}, "temperature=-0.1: at least 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_p": -0.1}, "top_p=-0.1: 0 to 1"),
        ({"top_p": 1.5}, "top_p=1.5: 0 to 1"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"seed": 2**64}, f"seed={2**64}"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, float], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        Sampling(**wrong)  # type: ignore[arg-type]
    assert caught.value.hint
