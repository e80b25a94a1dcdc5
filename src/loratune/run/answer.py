"""`generate` and `evaluate`: what an opened run answers, and how well it fits rows it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from loratune.config import TrainConfig
from loratune.data.example import Example
from loratune.data.read import read
from loratune.data.render import render_prompt
from loratune.data.tasks import DATA_TASKS
from loratune.engine import GREEDY, Answer, Sampling, make_ready
from loratune.engine import generate as continue_prompts
from loratune.evaluation import MEASURES, exact_match, held_out_batches, held_out_loss
from loratune.model import context_of, stop_ids, why_not_packed
from loratune.run.decide import Decisions, decide_length
from loratune.run.opened import Opened
from loratune.run.samples import asking_of
from loratune.run.task import require_language_model

_LIMIT = 2048


def generate(
    opened: Opened,
    examples: Sequence[Example],
    sampling: Sampling = GREEDY,
    *,
    batch_size: int = 16,
    done: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """The model's answer to each example's prompt, beside the answer the data has (None where it has none)."""
    require_language_model(opened.base.head, "generate", "`loratune eval RUN --data FILE` measures it")
    prompts, references = _prompts(opened, examples)
    answers = _answers(opened, prompts, sampling, batch_size, done)
    return [
        ({} if example.id is None else {"id": example.id})
        | {
            "place": str(example.place),
            "prompt": opened.base.tokenizer.decode(list(prompt)),
            "reference": reference if example.answered else None,
            "output": answer.text,
            "stopped": answer.stopped,
            "tokens": len(answer.ids),
        }
        for example, prompt, reference, answer in zip(examples, prompts, references, answers, strict=True)
    ]


def evaluate(
    opened: Opened,
    data: Any,
    *,
    answers: int = 0,
    sampling: Sampling = GREEDY,
    done: Callable[[int], None] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Loss and the task's metrics on all rows.

    Of a causal LM the loss and perplexity of supervised tokens, and exact matches of greedy answers to the first rows.

    Args:
        answers: how many rows are answered; 0 for none.
        settings: the data options of `loratune train`.
    """
    decisions = Decisions(TrainConfig(**settings))
    tokenizer, model, head = opened.base.tokenizer, opened.base.model, opened.base.head
    task, measure = DATA_TASKS[head.task], MEASURES.get(head.task)
    corpus = read(data, columns=decisions["columns"], shapes=task.shapes)
    rendered = task.rows(
        corpus.examples,
        tokenizer,
        labels=head.labels,
        loss=decisions["loss"],
        max_length=decide_length(decisions, context_of(model)),
        overlong=decisions["overlong"],
    )
    if answers:
        require_language_model(head, "--answers", "leave it out: every row is answered, and the metrics say how well")
        make_ready(model)  # before the loss: with and without the adapter, it is measured of the same kernels
    packed = task.packed and why_not_packed(model) is None
    batches = held_out_batches(rendered.rows, packed=packed, limit=_LIMIT, pad_id=opened.base.pad_id)
    held_out = held_out_loss(model, batches, opened.base.device)
    found = {
        "rows": rendered.examples,
        f"supervised_{task.unit}": held_out.supervised_tokens,
        "loss": held_out.loss,
        "dropped": len(rendered.dropped),
    }
    more = measure.metrics(model, rendered.rows, asking_of(opened.base)) if measure else None
    found |= {"perplexity": held_out.perplexity} if more is None else more
    if answers:
        prompts, references = _prompts(opened, corpus.examples[:answers])
        texts = [answer.text for answer in _answers(opened, prompts, sampling, 16, done)]
        found |= {"answered": len(texts), "exact_match": exact_match(texts, references)}
    return found


def _prompts(opened: Opened, examples: Sequence[Example]) -> tuple[list[tuple[int, ...]], list[str]]:
    pairs = [render_prompt(example, opened.base.tokenizer) for example in examples]
    return [prompt for prompt, _ in pairs], [reference for _, reference in pairs]


def _answers(
    opened: Opened,
    prompts: Sequence[tuple[int, ...]],
    sampling: Sampling,
    batch_size: int,
    done: Callable[[int], None] | None,
) -> list[Answer]:
    make_ready(opened.base.model)
    stops = stop_ids(opened.base.model, opened.base.tokenizer)
    return continue_prompts(
        opened.base.model, opened.base.tokenizer, prompts, stops, sampling, batch_size=batch_size, done=done
    )
