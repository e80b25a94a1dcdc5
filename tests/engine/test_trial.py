"""What cannot be continued together is found by trying, or by what the config says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Cache

from loratune.engine import Engine, Limits, Sampling, generate, why_not_batched
from loratune.engine.slots import Slots
from loratune.errors import ConfigError
from loratune.model import attention, why_not_packed
from tests.models import FAMILIES, tiny
from tests.oracle.decoding import greedy
from tests.tiny import tiny_tokenizer

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [20, 21, 22]]


def packed(family: str = "llama", **changes: Any) -> Any:
    model = tiny(family, **changes)
    assert why_not_packed(model) is None
    return model


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gemma2"}))
def test_families_that_are_continued_together(family: str) -> None:
    assert why_not_batched(packed(family).train(), 128) is None


def test_in_bf16_and_once_a_dtype() -> None:
    model = packed()
    passes = list[int]()
    model.register_forward_hook(lambda *_: passes.append(1))
    assert why_not_batched(model, 128) is None
    tried = len(passes)
    assert tried > 0
    assert why_not_batched(model, 64) is None
    assert len(passes) == tried
    assert why_not_batched(model.to(torch.bfloat16), 128) is None
    assert len(passes) == 2 * tried


def test_an_attention_that_does_not_know_steps() -> None:
    model = tiny("gemma2")
    model.set_attn_implementation(attention.NAME)
    assert why_not_batched(model, 128) == "its attention uses softcap"


def planted_caches(model: Any) -> None:
    """Positions that follow from the cache, whatever is told: packed rows are right, and steps are not."""

    def before(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, Cache) and kwargs.get("step") is not None:
            kwargs["position_ids"] = torch.full_like(kwargs["position_ids"], cache.get_seq_length())
        return args, kwargs

    model.model.register_forward_pre_hook(before, with_kwargs=True)


def planted_failure(model: Any) -> None:
    """A family with a cache of its own kind."""

    def before(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if isinstance(kwargs.get("past_key_values"), Slots):
            kwargs["past_key_values"].conv_states  # noqa: B018
        return args, kwargs

    model.model.layers[0].register_forward_pre_hook(before, with_kwargs=True)


def planted_memory(model: Any) -> None:
    """A layer that goes on from what it saw last."""
    last = [torch.zeros(1, 1, 1)]

    def after(*call: Any) -> torch.Tensor:
        found: torch.Tensor = call[-1]
        if found.shape[1] < 4:
            found = found + last[0]
        last[0] = found[:1, -1:]
        return found

    model.model.layers[1].register_forward_hook(after)


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (planted_caches, "continued rows deviate from lone ones by"),
        (planted_failure, r"continuing rows fails in it \(AttributeError\)"),
        (planted_memory, "continued rows deviate from lone ones by"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_family_that_computes_steps_otherwise_is_refused(plant: Any, told: str, dtype: torch.dtype) -> None:
    model = packed().to(dtype)
    plant(model)
    assert why_not_packed(model) is None
    with pytest.raises(ConfigError, match=told) as caught:
        Engine(model)
    assert caught.value.hint == "answer one prompt at a time"


def test_generate_falls_back_to_the_familys_own_way() -> None:
    model = tiny()
    naive = [tuple(greedy(model, prompt, (), 6)[0]) for prompt in PROMPTS]
    planted_failure(model)
    answers = generate(model, tiny_tokenizer(), PROMPTS, frozenset(), Sampling(6))
    assert [answer.ids for answer in answers] == naive


def test_chunks_of_the_context_are_refused() -> None:
    model = packed()
    model.config.layer_types = ["chunked_attention", "full_attention"]
    assert why_not_batched(model, 128) == "its attention goes by chunks of the context"


LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 32,
}


def with_longrope() -> Any:
    return tiny("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=32)


def test_positions_that_depend_on_the_longest_row() -> None:
    model = with_longrope()
    assert why_not_packed(model) is None
    assert why_not_batched(model, 32) is None
    assert why_not_batched(model, 33) == "a row of more than 32 tokens would change the positions of all others"
    assert Engine(model, limits=Limits(longest=32)).longest == 32
    with pytest.raises(ConfigError, match="a row of more than 32 tokens") as caught:
        Engine(model)
    assert caught.value.hint == "let rows have 32 tokens at most"


def test_a_long_row_changes_nothing_of_the_short_ones() -> None:
    model, long = with_longrope(), list(range(3, 103))

    def answers(*prompts: list[int]) -> list[tuple[int, ...]]:
        return [a.ids for a in generate(model, tiny_tokenizer(), prompts, frozenset({1}), Sampling(20))]

    short = [[5, 6, 7], list(range(40, 50))]
    naive = [tuple(greedy(model, prompt, (1,), 20)[0]) for prompt in short]
    assert answers(*short) == naive
    assert answers(short[0], long, short[1]) == [naive[0], *answers(long), naive[1]]


def test_dynamic_positions_change_only_where_no_row_goes() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model, prompts = tiny(rope_parameters=rope), [[5, 6, 7], list(range(3, 123))]
    naive = [tuple(greedy(model, prompt, (1,), 8)[0]) for prompt in prompts]
    answers = generate(model, tiny_tokenizer(), prompts, frozenset({1}), Sampling(20))
    assert answers[0].ids[:8] == naive[0]
    assert answers[1].ids == naive[1]


def test_ropes_of_each_layer_type() -> None:
    model = packed()
    model.config.rope_parameters = {
        "full_attention": LONGROPE,
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert why_not_batched(model, 33) is not None
    model.config.rope_parameters = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    assert why_not_batched(model, 128) is None
