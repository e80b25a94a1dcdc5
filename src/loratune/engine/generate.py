"""Batch generation over prompts of any lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from loratune.errors import DataError
from loratune.model import context_of, evaluating


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; temperature 0 takes the likeliest one."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model wrote after one prompt. `stopped`: it ended by itself, not at the token limit."""

    text: str
    ids: tuple[int, ...]
    stopped: bool


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    stop_ids: frozenset[int],
    sampling: Sampling = GREEDY,
    *,
    batch_size: int = 16,
    done: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Continue each prompt (token ids); answers come back in the prompts' order.

    Prompts of similar lengths share a batch, padded on the left; answers end where the longest of them leaves no room
    in the model's context. `done` is told how many rows a batch finished.

    Raises:
        DataError: a prompt that fills the model's context alone.
    """
    context = context_of(model)
    _refuse_full(prompts, context)
    if sampling.temperature > 0:
        torch.manual_seed(sampling.seed)
    answers: dict[int, Answer] = {}
    generation: Any = model.generate
    with evaluating(model):
        for group in _by_length(prompts, batch_size):
            width = max(len(prompts[i]) for i in group)
            most = min(sampling.max_new_tokens, context - width) if context else sampling.max_new_tokens
            config = _config(sampling, most, stop_ids, tokenizer)
            pad = config.pad_token_id
            ids = torch.tensor([[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in group])
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in group])
            output = generation(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
            )
            for i, row in zip(group, output[:, width:].tolist(), strict=True):
                answers[i] = _answer(row, stop_ids, tokenizer)
            if done is not None:
                done(len(group))
    return [answers[i] for i in range(len(prompts))]


def _refuse_full(prompts: Sequence[Sequence[int]], context: int | None) -> None:
    full = [i for i, prompt in enumerate(prompts) if context and len(prompt) >= context]
    if full:
        problems = [f"prompt {i + 1}: {len(prompts[i])} tokens, the model's context has {context}" for i in full]
        raise DataError(problems, hint="shorten it, so that there is room for an answer")


def _config(
    sampling: Sampling, most: int, stop_ids: frozenset[int], tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    sampled = sampling.temperature > 0
    chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampled else {}
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=most,
        do_sample=sampled,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=pad if pad is not None else min(stop_ids, default=0),
        **chosen,
    )


def _by_length(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _answer(row: list[int], stop_ids: frozenset[int], tokenizer: PreTrainedTokenizerBase) -> Answer:
    end = next((i for i, token in enumerate(row) if token in stop_ids), None)
    ids = tuple(row if end is None else row[:end])
    return Answer(str(tokenizer.decode(list(ids), skip_special_tokens=True)), ids, end is not None)
