"""What `loratune data` and `loratune plan` show: nothing is trained, and `plan` loads no weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from loratune.adapt import TargetPlan, share_line
from loratune.adapt import plan as plan_targets
from loratune.config import ALL_LINEAR, NO_TARGETS, LoraConfig, TrainConfig
from loratune.config.methods import LORA
from loratune.data.fit import show_mask
from loratune.data.render import Rendered
from loratune.data.tasks import DATA_TASKS
from loratune.estimation import BaseMemory, MemoryEstimate, Pass, Shape, estimate_memory, step_flops
from loratune.model import LANGUAGE_MODEL, Head, context_of, empty_model, kind_of_device, load_tokenizer, may_be_fused
from loratune.quant import refuse_format
from loratune.run.decide import Decisions, decide_optimizer, decide_targets, describe, lora_config
from loratune.run.prepare import Prepared, Rows, data_line, prepare
from loratune.run.record import adapter_facts, data_facts
from loratune.run.setup import all_of, decide_adapter, decide_task
from loratune.run.task import choose_head
from loratune.training.sharding import units_of

# Processes that a base is divided among, of which the plan says how much memory each takes.
_PARTS = (2, 4, 8)
_ITEMSIZE = {"auto": 2, "bf16": 2, "fp32": 4}


def look_at_data(model: str, data: Any, *, show_masks: int = 0, **settings: Any) -> dict[str, Any]:
    """Rows, lengths, what is left out, and the loss mask of the first rows as (text, supervised) pieces."""
    decisions = Decisions(TrainConfig(**settings))
    tokenizer = load_tokenizer(model)
    head, rows = choose_head(model, Rows(data), decisions.config)
    prepared = prepare(rows, decisions, tokenizer, context_of(empty_model(model, head)), head)
    return {
        "line": data_line(prepared),
        **data_facts(prepared),
        "task": {"type": head.task, "reason": head.reason, "unit": DATA_TASKS[head.task].unit},
        "columns": list(prepared.corpus.columns),
        "ignored_columns": list(prepared.corpus.ignored_columns),
        "masks": [_mask(row, head, tokenizer) for row in prepared.rows[:show_masks]],
    }


def _mask(row: Rendered, head: Head, tokenizer: Any) -> dict[str, Any]:
    """A row in pieces that are in the loss or not, and in words what is not among its tokens."""
    said = DATA_TASKS[head.task].said(row, head.labels, lambda ids: str(tokenizer.decode(list(ids))))
    return {"place": str(row.place), "pieces": show_mask(row, tokenizer), "said": said}


def look_at_plan(model: str, data: Any = None, **settings: Any) -> dict[str, Any]:
    """Parameters, memory and arithmetic of a run, from the model's config and the data alone.

    Without data the rank is the one given, or 8, and nothing is said about steps.
    """
    config = TrainConfig(**settings)
    decisions = Decisions(config)
    device_type = kind_of_device(config.device)
    if config.quant is not None:
        refuse_format(config.quant, device_type)
    kind = decide_optimizer(decisions, device_type)
    head, rows = (LANGUAGE_MODEL, Rows(data)) if data is None else choose_head(model, Rows(data), config)
    empty = empty_model(model, head)
    shape = Shape.of(empty)
    itemsize = _ITEMSIZE[config.dtype]
    if data is None:
        lora = _lora_without_data(config, empty)
        targets = plan_targets(empty, lora)
        targets.check()
        found: dict[str, Any] = {}
        tokens = scored = decisions["batch_size"] * 512
        longest = 512
    else:
        prepared = prepare(rows, decisions, load_tokenizer(model), context_of(empty), head)
        decide_task(decisions, empty, head, ())
        lora, targets = decide_adapter(empty, decisions, prepared, shape)
        tokens, scored, longest = _step_tokens(prepared, decisions)
        found = {"data": data_line(prepared), "steps": decisions["max_steps"], "lr": decisions["lr"]}
    if "micro_batch_tokens" in decisions.values:
        share = min(1.0, decisions["micro_batch_tokens"] / tokens)
        tokens, scored = int(tokens * share), int(scored * share)
    recompute = decisions["recompute"] == "on"
    fused = may_be_fused(empty) if config.fused is None else config.fused
    through = Pass(itemsize, tokens, scored, longest, recompute, fused, device_type)

    def estimated(plan: TargetPlan, quant: str | None, parts: int = 1) -> MemoryEstimate:
        held = BaseMemory.of(empty, itemsize, quant, in_layers=units_of(empty))
        return estimate_memory(plan, shape, through, held, optimizer=kind.bytes_of(plan.sizes()), parts=parts)

    memory = estimated(targets, config.quant)
    divided = {} if config.quant is not None else {str(n): estimated(targets, None, n).total for n in _PARTS}
    methods = {
        method: _plain(estimated(plan_targets(empty, other), quant))
        for method, other, quant in _other_methods(empty, lora)
    }
    return {
        **found,
        "line": f"{_which(lora, config)} · {share_line(targets.trainable, targets.total)}",
        "fewer": targets.base_parameters / targets.trainable,
        "layers": {str(index): parameters for index, parameters in targets.by_layer.items()},
        "adapter": adapter_facts(targets),
        "base_parameters": targets.base_parameters,
        "memory": {**_plain(memory), "micro_batch_tokens": tokens},
        "methods": methods,
        "sharded": divided,
        "step_flops": step_flops(targets, shape, tokens, scored, recompute=recompute),
        "decisions": describe(decisions.to_json()),
        "notes": list(targets.notes),
    }


def _which(lora: LoraConfig, config: TrainConfig) -> str:
    low_rank = lora.target_modules != NO_TARGETS or lora.target_parameters
    return lora.described if low_rank else config.method


def _plain(memory: MemoryEstimate) -> dict[str, int]:
    return {**asdict(memory), "working": memory.working, "adapter": memory.adapter, "total": memory.total}


def _other_methods(model: Any, lora: LoraConfig) -> Iterator[tuple[str, LoraConfig, str | None]]:
    """What else could be trained, with the format of the base: the same low-rank terms, all biases, everything."""
    has_some = lora.target_modules != NO_TARGETS or lora.target_parameters
    low_rank = lora if has_some and lora.peft_type == LORA else LoraConfig(target_modules=ALL_LINEAR)
    yield "lora", low_rank, None
    yield "qlora", low_rank, "nf4"
    bitfit = LoraConfig(target_modules=NO_TARGETS, bias="all")
    if not plan_targets(model, bitfit).problems:
        yield "bitfit", bitfit, None
    yield "full", LoraConfig(target_modules=NO_TARGETS, modules_to_save=all_of(model), ensure_weight_tying=True), None


def _lora_without_data(config: TrainConfig, model: Any) -> LoraConfig:
    decisions = Decisions(config)
    if config.target_modules == NO_TARGETS and not config.target_parameters:
        if config.method == "full":
            decisions.decide("modules_to_save", all_of(model), "all of the model")
        return lora_config(decisions)
    decide_targets(decisions, getattr(model.config, "model_type", None))
    if config.peft_type == LORA:
        r = decisions.decide("r", 8, "no data to decide by")
        decisions.decide("lora_alpha", 2 * r, "twice the rank")
    return lora_config(decisions)


def _step_tokens(prepared: Prepared, decisions: Decisions) -> tuple[int, int, int]:
    """Tokens and supervised tokens of the largest step that `batch_size` rows can make, and of its longest row."""
    rows = sorted(prepared.rows, key=lambda row: row.needed, reverse=True)[: decisions["batch_size"]]
    return sum(row.needed for row in rows), sum(row.units for row in rows), rows[0].needed
