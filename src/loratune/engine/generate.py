"""Answers to many prompts of any lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import FloatTensor, LongTensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from loratune.adapt import adapters
from loratune.engine.batch import Chosen, Engine, Limits, Request
from loratune.engine.choose import GREEDY, Sampling, is_sound
from loratune.engine.text import Text
from loratune.engine.trial import longest_alike, places_in_memory, why_not_batched
from loratune.errors import AdapterStateError, DataError, DivergedError
from loratune.model import context_of, decoding, evaluating, freed_memory_kept, packing

_Done = Callable[[int], None]


class _Work(NamedTuple):
    """What is to be answered, and how.

    Attributes:
        longest: tokens of a row, prompt and answer. done: told how many answers have just been finished.
        hear: told each token of an answer as it is chosen, by the prompt's place.
    """

    prompts: Sequence[Sequence[int]]
    stop_ids: frozenset[int]
    sampling: Sampling
    batch_size: int
    longest: int
    done: _Done
    hear: Callable[[int, Chosen], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model wrote after one prompt. `stopped`: it ended by itself, not at the token limit."""

    text: str
    ids: tuple[int, ...]
    stopped: bool


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    stop_ids: frozenset[int],
    sampling: Sampling = GREEDY,
    *,
    batch_size: int = 16,
    done: _Done | None = None,
    hear: Callable[[int, str], None] | None = None,
) -> list[Answer]:
    """Continue each prompt (token ids) with what is active on the model; answers come back in the prompts' order.

    An answer ends where the model's context does. Sampled answers have seeds of their own, counted from the one given.

    Args:
        done: told how many answers have just been finished.
        hear: told the text of an answer, by the prompt's place, as it comes; whole at the end where a model's rows or
            its tokenizer allow no other way.

    Raises:
        DataError: a prompt that fills the model's context alone. DivergedError: a prompt after which the model gives
            numbers that are not finite.
    """
    context = context_of(model)
    _refuse_full(prompts, context)
    longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
    longest = min(longest, context or longest)
    told = _Told(tokenizer, hear)
    work = _Work(prompts, stop_ids, sampling, batch_size, longest, done or (lambda _: None), told.token)
    with packing(model) as packed, evaluating(model):
        batched = packed and why_not_batched(model, work.longest) is None
        if not batched and longest > (longest_alike(model) or longest):
            work = work._replace(batch_size=1)  # a long row would change the positions of those beside it
        rows = _together(model, work) if batched else _padded(model, work)
    answers = [_answer(row, stop_ids, tokenizer) for row in rows]
    told.rest(answers)
    return answers


class _Told:
    """Answers as they come, for who wants to hear them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, hear: Callable[[int, str], None] | None) -> None:
        self._hear, self._tokenizer = hear, tokenizer
        self._possible = getattr(tokenizer, "backend_tokenizer", None) is not None
        self._texts: dict[int, Text] = {}

    def token(self, place: int, chosen: Chosen) -> None:
        if self._hear is not None and self._possible:
            text = self._texts.setdefault(place, Text(self._tokenizer, ()))
            piece = text.add(chosen)
            if piece:
                self._hear(place, piece)

    def rest(self, answers: Sequence[Answer]) -> None:
        for place, answer in enumerate(answers):
            if self._hear is not None and place not in self._texts:
                self._hear(place, answer.text)


def _together(model: PreTrainedModel, work: _Work) -> list[list[int]]:
    """By the engine: a prompt begins where another answer has ended. The longest first, so that the last are short."""
    prompts, stop_ids, sampling, batch_size, longest, done, hear = work
    # Fewer at a time rather than shorter ones.
    slots = max(1, min(batch_size, places_in_memory(model) // longest))
    engine, name = _engine(model, Limits(slots=slots, longest=longest))
    place = {}
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        own = replace(sampling, seed=sampling.seed + i)
        place[engine.submit(Request(tuple(prompts[i]), stop_ids, own, name))] = i
    rows: list[list[int]] = [[] for _ in prompts]
    # A copy of all weights takes longer than one answer.
    with decoding(model, copy=len(prompts) > 1), freed_memory_kept(model.device):
        while engine.busy:
            told = engine.step()
            _refuse_broken(place[chosen.ticket] for chosen in told if chosen.finish == "broken")
            for chosen in told:
                rows[place[chosen.ticket]].append(chosen.token)
                hear(place[chosen.ticket], chosen)
            ended = sum(chosen.finish is not None for chosen in told)
            if ended:
                done(ended)
    return rows


def _engine(model: PreTrainedModel, limits: Limits) -> tuple[Engine, str | None]:
    """An engine for what is active on the model, and the name by which requests have it.

    By its name a single adapter is faster by an eighth (61 ms a token instead of 70 for SmolLM2 on two cores): its
    factors are rounded once, not for every token.
    """
    try:
        lora = adapters(model)
        if lora.active and lora.active == lora.names and len(lora.names) == 1:
            return Engine(model, lora, limits), lora.names[0]
    except AdapterStateError:  # none, a merged one, or one that computes its own way
        pass
    return Engine(model, limits=limits), None


@torch.no_grad()
def _padded(model: PreTrainedModel, work: _Work) -> list[list[int]]:
    """By the family's own generation, for those that cannot take packed rows: batches of similar lengths, padded."""
    prompts, stop_ids, sampling, batch_size, _, done, _ = work
    if not sampling.greedy:
        torch.manual_seed(sampling.seed)
    rows: list[list[int]] = [[] for _ in prompts]
    generation: Any = model.generate
    context, pad = context_of(model), min(stop_ids, default=0)
    embeddings: Any = model.get_input_embeddings()
    # Without any, those of the model's own config would count: a token then that it has not.
    stops = sorted(stop_ids) or [embeddings.weight.shape[0]]
    for group in _by_length(prompts, batch_size):
        width = max(len(prompts[i]) for i in group)
        most = min(sampling.max_new_tokens, context - width) if context else sampling.max_new_tokens
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in group])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in group])
        output = generation(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=_config(sampling, most, stops, pad),
            logits_processor=LogitsProcessorList([_Sound(group)]),
        )
        for i, row in zip(group, output[:, width:].tolist(), strict=True):
            rows[i] = row
        done(len(group))
    return rows


def _refuse_full(prompts: Sequence[Sequence[int]], context: int | None) -> None:
    full = [i for i, prompt in enumerate(prompts) if context and len(prompt) >= context]
    if full:
        problems = [f"prompt {i + 1}: {len(prompts[i])} tokens, the model's context has {context}" for i in full]
        raise DataError(problems, hint="shorten it, so that there is room for an answer")


class _Sound(LogitsProcessor):
    """Ends a generation in which a row breaks, before anything is drawn for it.

    Attributes:
        group: which prompts its rows are.
    """

    def __init__(self, group: Sequence[int]) -> None:
        self.group = group

    def __call__(self, _: LongTensor, scores: FloatTensor) -> FloatTensor:
        _refuse_broken(self.group[i] for i in (~is_sound(scores)).nonzero()[:, 0].tolist())
        return scores


def _refuse_broken(places: Iterable[int]) -> None:
    problems = [f"prompt {place + 1}: the model's logits are NaN or infinite" for place in sorted(places)]
    if problems:
        raise DivergedError(problems, hint="try --dtype fp32, or an earlier checkpoint of the adapter")


def _config(sampling: Sampling, most: int, stops: list[int], pad: int) -> GenerationConfig:
    sampled = not sampling.greedy
    chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampled else {}
    return GenerationConfig(max_new_tokens=most, do_sample=sampled, eos_token_id=stops, pad_token_id=pad, **chosen)


def _by_length(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _answer(row: list[int], stop_ids: frozenset[int], tokenizer: PreTrainedTokenizerBase) -> Answer:
    end = next((i for i, token in enumerate(row) if token in stop_ids), None)
    ids = tuple(row if end is None else row[:end])
    return Answer(str(tokenizer.decode(list(ids), skip_special_tokens=True)), ids, end is not None)
