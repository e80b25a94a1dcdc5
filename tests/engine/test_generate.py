"""Batched decoding gives what decoding one prompt at a time without any cache gives."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import loratune as lt
from loratune.engine import Sampling, generate, make_ready
from loratune.engine.passes import Passes
from loratune.errors import DataError, DivergedError
from loratune.lora import blocks_help
from loratune.model import fuse, fused, use_packed_attention
from loratune.model.decoding_linear import DecodingLinear
from tests.models import FAMILIES, tiny
from tests.oracle.decoding import greedy
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    dice = random.Random(seed)
    return [[dice.randrange(3, 400) for _ in range(length)] for length in lengths]


PROMPTS = prompts_of(11, 3, 7, 1, 19, 7)


def stops_for(model: Any) -> frozenset[int]:
    """Tokens that some, but not all, of the greedy answers contain: those end early, the others at the limit."""
    answers = [greedy(model, prompt, (), 8)[0] for prompt in PROMPTS]
    return frozenset({answers[0][3], answers[2][0], answers[4][7]})


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("batch_size", [16, 2])
def test_greedy_is_the_naive_loop(family: str, batch_size: int) -> None:
    model = tiny(family)
    if family != "gemma2":
        use_packed_attention(model)  # as a model is after training
    stops = stops_for(model)
    answers = generate(model, TOKENIZER, PROMPTS, stops, Sampling(max_new_tokens=8), batch_size=batch_size)
    naive = [greedy(model, prompt, stops, 8) for prompt in PROMPTS]
    assert [(list(answer.ids), answer.stopped) for answer in answers] == naive
    assert {True, False} == {answer.stopped for answer in answers}
    for answer in answers:
        assert answer.text == TOKENIZER.decode(list(answer.ids), skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_no_stop_tokens(family: str) -> None:
    """Not those of the model's own generation config either."""
    model = tiny(family)
    naive = [tuple(greedy(model, prompt, (), 5)[0]) for prompt in PROMPTS]
    model.generation_config.eos_token_id = naive[0][2]
    answers = generate(model, TOKENIZER, PROMPTS, frozenset(), Sampling(max_new_tokens=5))
    assert [(answer.ids, answer.stopped) for answer in answers] == [(ids, False) for ids in naive]


def test_nothing_to_do() -> None:
    assert generate(tiny(), TOKENIZER, [], frozenset({1})) == []


def test_order_and_progress() -> None:
    model, done = tiny(), list[int]()
    forward = generate(
        model, TOKENIZER, PROMPTS, frozenset({1}), Sampling(max_new_tokens=4), batch_size=4, done=done.append
    )
    backward = generate(model, TOKENIZER, PROMPTS[::-1], frozenset({1}), Sampling(max_new_tokens=4), batch_size=3)
    assert forward == backward[::-1]
    assert done == [4, 2]


def test_sampling_follows_its_seed() -> None:
    model = tiny()

    def sampled(seed: int, **how: Any) -> list[tuple[int, ...]]:
        sampling = Sampling(max_new_tokens=8, temperature=1.0, seed=seed, **how)
        return [answer.ids for answer in generate(model, TOKENIZER, PROMPTS, frozenset(), sampling)]

    first = sampled(0)
    torch.rand(3)  # whatever was drawn before has no part in it
    assert sampled(0) == first
    assert sampled(1) != first
    naive = [tuple(greedy(model, prompt, (), 8)[0]) for prompt in PROMPTS]
    assert first != naive
    # A nucleus that holds the likeliest token alone, or a temperature near zero, is greedy decoding.
    assert sampled(0, top_p=1e-6) == naive
    cold = Sampling(max_new_tokens=8, temperature=1e-4, seed=0)
    assert [answer.ids for answer in generate(model, TOKENIZER, PROMPTS, frozenset(), cold)] == naive


def test_model_is_left_as_it_was() -> None:
    model = tiny().train()
    before = model.generation_config.to_dict()
    generate(model, TOKENIZER, PROMPTS[:1], frozenset({1}), Sampling(max_new_tokens=2))
    assert model.training
    assert model.generation_config.to_dict() == before


def test_dropout_is_off() -> None:
    model = tiny("gpt2", resid_pdrop=0.5).train()
    answers = generate(model, TOKENIZER, PROMPTS, frozenset(), Sampling(max_new_tokens=6))
    naive = [tuple(greedy(model.eval(), prompt, (), 6)[0]) for prompt in PROMPTS]
    assert [answer.ids for answer in answers] == naive


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_context_ends_an_answer(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """GPT-2 has no position beyond its context: asking for one raises an IndexError deep inside."""
    model = tiny(family)
    (prompt,) = prompts_of(120)
    (answer,) = generate(model, TOKENIZER, [prompt], frozenset(), Sampling(max_new_tokens=50))
    assert len(answer.ids) == 8
    assert not answer.stopped
    assert list(answer.ids) == greedy(model, prompt, (), 8)[0]


def test_prompt_that_fills_the_context() -> None:
    with pytest.raises(DataError) as caught:
        generate(tiny(), TOKENIZER, [*PROMPTS, *prompts_of(128, 200)], frozenset({1}))
    assert caught.value.problems == (
        "prompt 7: 128 tokens, the model's context has 128",
        "prompt 8: 200 tokens, the model's context has 128",
    )


def test_tokenizer_without_a_pad_token() -> None:
    model = tiny()
    answers = generate(model, tiny_tokenizer(pad=None), PROMPTS, frozenset({1}), Sampling(max_new_tokens=4))
    assert answers == generate(model, TOKENIZER, PROMPTS, frozenset({1}), Sampling(max_new_tokens=4))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_fused_model_keeps_what_its_prompts_gave(family: str) -> None:
    """Samples are taken of a model in the middle of training; its fused attention knows of no cache."""
    model = tiny(family)
    naive = [tuple(greedy(model, prompt, (), 6)[0]) for prompt in PROMPTS]
    use_packed_attention(model)
    assert fuse(model)
    answers = generate(model, TOKENIZER, PROMPTS, frozenset(), Sampling(max_new_tokens=6))
    assert [answer.ids for answer in answers] == naive


def test_the_attention_is_what_it_was() -> None:
    for name in ("sdpa", "eager"):
        model = tiny()
        model.set_attn_implementation(name)
        for _ in range(2):
            generate(model, TOKENIZER, PROMPTS[:2], frozenset(), Sampling(max_new_tokens=2))
            assert model.config._attn_implementation == name


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_breaks_is_no_answer(family: str, temperature: float) -> None:
    """By the engine and by the family's own way alike."""
    model, ids = tiny(family), list[torch.Tensor]()
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: ids.append(args[0]))
    model.model.layers[0].register_forward_hook(
        lambda *call: call[-1].masked_fill((ids[-1] == 399)[..., None], torch.nan)
    )
    prompts = [PROMPTS[0], [5, 399, 6], PROMPTS[1], [399]]
    with pytest.raises(DivergedError) as caught:
        generate(model, TOKENIZER, prompts, frozenset(), Sampling(4, temperature=temperature, top_p=0.9), batch_size=4)
    assert caught.value.problems == (
        "prompt 2: the model's logits are NaN or infinite",
        "prompt 4: the model's logits are NaN or infinite",
    )


def test_fewer_rows_at_once_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    expected = generate(model, TOKENIZER, PROMPTS, frozenset(), Sampling(max_new_tokens=8))
    room = 2 * (19 + 8) * (2 * 2 * 2 * 8 * 4)  # two rows of layers, keys and values, heads, their size, bytes
    monkeypatch.setattr("loratune.engine.trial.available_memory", lambda _: int(room / 0.8) + 1)
    rows = list[int]()
    over = Passes.over

    def counted(self: Passes, *asked: Any, **named: Any) -> Any:
        rows.append(len(asked[0]) + len(asked[2]))
        return over(self, *asked, **named)

    monkeypatch.setattr(Passes, "over", counted)
    assert generate(model, TOKENIZER, PROMPTS, frozenset(), Sampling(max_new_tokens=8)) == expected
    assert max(rows) == 2


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_answers_are_heard_as_they_are_written(family: str) -> None:
    """In pieces where rows are continued here; whole where the family does it."""
    model, heard = tiny(family), [list[str]() for _ in PROMPTS]
    stops = stops_for(model)
    answers = generate(
        model, TOKENIZER, PROMPTS, stops, Sampling(max_new_tokens=8), hear=lambda i, piece: heard[i].append(piece)
    )
    assert ["".join(pieces) for pieces in heard] == [answer.text for answer in answers]
    assert (max(map(len, heard)) > 2) == (family == "llama")


def test_a_tokenizer_of_python_only_is_heard_at_the_end() -> None:
    class Slow:
        def decode(self, ids: list[int], **_: Any) -> str:
            return " ".join(map(str, ids))

    heard = []
    answers = generate(
        tiny(), Slow(), PROMPTS[:2], frozenset(), Sampling(max_new_tokens=3), hear=lambda *said: heard.append(said)
    )  # type: ignore[arg-type]
    assert heard == [(place, answer.text) for place, answer in enumerate(answers)]


@torch.no_grad()
def test_a_model_made_ready_gives_what_it_gave() -> None:
    model = tiny().bfloat16().requires_grad_(False)
    before = [answer.ids for answer in generate(model, TOKENIZER, PROMPTS, frozenset(), Sampling(max_new_tokens=4))]
    assert make_ready(model) is None
    assert fused(model)
    assert any(isinstance(module, DecodingLinear) for module in model.modules()) == blocks_help(model.lm_head.weight)
    assert make_ready(model) is None  # once more changes nothing
    after = [answer.ids for answer in generate(model, TOKENIZER, PROMPTS, frozenset(), Sampling(max_new_tokens=4))]
    assert sum(a[0] == b[0] for a, b in zip(before, after, strict=True)) >= len(PROMPTS) - 1  # roundings aside


def test_a_family_that_cannot_be_packed_stays_as_it_is() -> None:
    model = tiny("gemma2")
    before = [type(module) for module in model.modules()]
    assert make_ready(model) is not None
    assert [type(module) for module in model.modules()] == before


def noted_names(monkeypatch: pytest.MonkeyPatch) -> set[str | None]:
    """The names by which rows have their adapter, as passes are told them."""
    seen: set[str | None] = set()
    over = Passes.over

    def noted(self: Passes, tokens: Any, lengths: Any, prompts: Any, names: Any, **how: Any) -> Any:
        if self.slots.count == 6:  # not those of a trial
            seen.update(names)
        return over(self, tokens, lengths, prompts, names, **how)

    monkeypatch.setattr(Passes, "over", noted)
    return seen


def everything_random(lora: lt.Adapters) -> None:
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.2)


@pytest.mark.parametrize("state", ["one", "dora", "off", "two", "another", "merged"])
def test_what_is_active_answers(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is computed: by its name where it is the only one, else as the layers do."""
    model = tiny().requires_grad_(False)
    lora = lt.attach(model, lt.LoraConfig(r=4, target_modules="all-linear", use_dora=state == "dora"))
    everything_random(lora)
    if state in ("two", "another"):
        lora.add(lt.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), "other")
        lora.activate(*(("default", "other") if state == "two" else ("other",)))
    if state == "merged":
        lora.merge()
    named = noted_names(monkeypatch)
    with lora.disabled() if state == "off" else nullcontext():
        answers = generate(model, TOKENIZER, PROMPTS, frozenset(), Sampling(max_new_tokens=6), batch_size=6)
        assert [list(answer.ids) for answer in answers] == [greedy(model, prompt, (), 6)[0] for prompt in PROMPTS]
    assert named == {"default" if state == "one" else None}
    assert lora.merged == (state == "merged")
    assert lora.active == {"two": ("default", "other"), "another": ("other",)}.get(state, ("default",))


def test_an_adapter_that_is_broken_is_no_answer() -> None:
    model = tiny().requires_grad_(False)
    lora = lt.attach(model, lt.LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        next(iter(lora.parameters()))[0, 0] = torch.nan
    with pytest.raises(DivergedError, match="prompt 1: the model's logits are NaN"):
        generate(model, TOKENIZER, PROMPTS[:1], frozenset(), Sampling(max_new_tokens=6))


class Experts(nn.Module):
    """Each token goes through one of two linear layers, which is told the tokens that are its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat, y = x.flatten(0, -2), torch.zeros_like(x.flatten(0, -2))
        first = flat[:, 0] > 0
        for expert, own in zip(self.experts, (first, ~first), strict=True):
            y[own] = expert(flat[own])
        return y.view_as(x)


def test_layers_that_see_some_of_the_tokens() -> None:
    """An adapter on them cannot be given by rows; what is active answers all the same."""
    model = tiny()
    for layer in model.model.layers:
        layer.mlp = Experts(32)
    model.requires_grad_(False)
    lora = lt.attach(model, lt.LoraConfig(r=4, target_modules="all-linear"))
    everything_random(lora)
    answers = generate(model, TOKENIZER, PROMPTS, frozenset(), Sampling(max_new_tokens=6))
    assert [list(answer.ids) for answer in answers] == [greedy(model, prompt, (), 6)[0] for prompt in PROMPTS]
