"""What a training run needs before its first step, and every refusal that can be known by then."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from loratune.adapt import TargetPlan, plan, share_line
from loratune.config import ALL_LINEAR, LoraConfig, TrainConfig
from loratune.config.methods import LORA
from loratune.config.tasks import is_head
from loratune.data.batch import computed
from loratune.data.order import Order, bundle_size, groups_of
from loratune.data.pack import sharing
from loratune.data.render import Rendered
from loratune.data.tasks import DATA_TASKS
from loratune.errors import ConfigError
from loratune.estimation import (
    RECOMPUTED_FORWARDS,
    STEP_FORWARDS,
    BaseMemory,
    MemoryEstimate,
    Pass,
    Shape,
    bytes_per_token,
    estimate_memory,
    forward_rate,
    matmul_rate,
)
from loratune.model import (
    FEATURES,
    LANGUAGE_MODEL,
    Base,
    Head,
    context_of,
    ends_early,
    kernels_of,
    total_memory,
    why_no_shared_prefixes,
    why_not_fused,
    why_not_packed,
)
from loratune.quant import frozen_weight
from loratune.run.decide import Decisions, decide_optimizer, decide_targets, decide_training, lora_config
from loratune.run.prepare import Prepared, Rows, prepare
from loratune.run.spread import Spread
from loratune.training.processes import Processes
from loratune.training.sharding import units_of

# What comes after an encoder and is given one vector for each row.
_POOLED = re.compile(r"(^|\.)pooler\.")
# The settings that say which modules are adapted, and which tensors the adapter has its own of.
_WHICH_MODULES = (
    "task_type", "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "modules_to_save",
    "ensure_weight_tying", "bias", "trainable_token_indices", "peft_type",
)  # fmt: skip
# Larger micro-batches than these gain nothing: the products are then as efficient as they get.
_ENOUGH_TOKENS = {"cpu": 2048, "cuda": 16384, "mps": 4096}
_MEMORY_SHARE = 0.6
# Steps whose rows are looked at for common prefixes, and the share of tokens that is worth a tree, or groups.
_LOOKED_AT = 32
_WORTH = 0.1
# One process, with all of the base.
ALONE = Spread()


@dataclass(frozen=True)
class Setup:
    base: Base
    prepared: Prepared
    decisions: Decisions
    lora: LoraConfig
    targets: TargetPlan
    memory: MemoryEstimate
    seconds: float
    order: Order
    spread: Spread

    @property
    def processes(self) -> Processes:
        return self.spread.processes

    @property
    def device(self) -> torch.device:
        """Where steps are computed."""
        return self.spread.device or self.base.device

    @property
    def model(self) -> Any:
        return self.base.model


def set_up(base: Base, rows: Rows, config: TrainConfig, spread: Spread = ALONE) -> Setup:
    """Read the data, look at the model, decide what was left open. Nothing is changed but the base's kernels.

    All processes come to the same: what they measure is the least of what each finds.

    Raises:
        ConfigError, DataError: every refusal of a run that can be known before it starts.
    """
    decisions = Decisions(config)
    decisions.decide("device", str(spread.device or base.device), "the best one here")
    _note_spread(base, decisions, spread)
    decisions.values["dtype"] = "bf16" if base.precision.dtype.itemsize == 2 else "fp32"
    decisions.reasons["dtype"] = base.precision.reason
    if base.quant is not None:
        decisions.decide("quant", base.quant, "the loaded model's")
    shape = Shape.of(base.model)
    prepared = prepare(rows, decisions, base.tokenizer, context_of(base.model), base.head)
    decide_task(decisions, base.model, base.head, base.fresh)
    lora, targets = decide_adapter(base.model, decisions, prepared, shape)
    _decide_packing(base.model, decisions)
    order = _decide_sharing(base.model, decisions, prepared.rows)
    _decide_fused(base.model, decisions)
    kind = decide_optimizer(decisions, base.device.type)
    memory = _decide_memory(base, decisions, prepared, targets, shape, kind.bytes_of(targets.sizes()), spread)
    _decide_rhythm(decisions, prepared)
    seconds = _seconds(base, decisions, prepared, shape, spread)
    return Setup(base, prepared, decisions, lora, targets, memory, seconds, order, spread)


def decide_adapter(model: Any, decisions: Decisions, prepared: Prepared, shape: Shape) -> tuple[LoraConfig, TargetPlan]:
    """Rank, scale and rate from the data and the targets' widths, then the plan of what is adapted."""
    if decisions["method"] == "full":
        decisions.values["modules_to_save"], decisions.reasons["modules_to_save"] = all_of(model), "all of the model"
    decide_targets(decisions, getattr(model.config, "model_type", None))
    which = {name: decisions.values[name] for name in _WHICH_MODULES if name in decisions.values}
    if decisions["peft_type"] == LORA:
        which["r"] = 1
    one = plan(model, LoraConfig(**which))
    one.check()
    decide_training(decisions, prepared.fit, shape.hidden, sum(target.parameters for target in one.targets))
    config = lora_config(decisions)
    targets = plan(model, config)
    targets.check()
    return config, targets


def decide_task(decisions: Decisions, model: Any, head: Head, fresh: Sequence[str]) -> None:
    """What the run is for; what its base was given at random trains whole, whatever else does."""
    decisions.decide("task_type", head.task, head.reason)
    if not DATA_TASKS[head.task].counted and decisions.values.get("lora_dropout"):
        problem = f"lora_dropout={decisions['lora_dropout']}: masks are those of the tokens that the encoder reads"
        raise ConfigError(f"{problem}, and the decoder has others", hint="leave it out")
    poolers = tuple(path for path, module in model.named_modules() if _POOLED.search(path) and frozen_weight(module))
    if poolers and decisions["target_modules"] == ALL_LINEAR:
        why = "it sees one token of each row, and dropout's masks are those of tokens"
        decisions.decide("exclude_modules", poolers, why)
    unnamed = [path for path in fresh if not is_head(path, head.task)]
    if unnamed and head.labels:
        given = decisions.values.get("modules_to_save") or ()
        decisions.values["modules_to_save"] = tuple(dict.fromkeys([*given, *unnamed]))
        decisions.reasons["modules_to_save"] = f"the base's files have no {', '.join(unnamed)}: drawn, so it must train"


def all_of(model: Any) -> tuple[str, ...]:
    """The modules that hold all of a model's parameters between them."""
    return tuple(name for name, child in model.named_children() if any(True for _ in child.parameters()))


def plan_line(setup: Setup) -> str:
    """The plan in one line of a run's screen."""
    d, targets = setup.decisions, setup.targets
    minutes = f"~{setup.seconds / 60:.0f} min" if setup.seconds > 90 else f"~{setup.seconds:.0f} s"
    total = total_memory(setup.device)
    shared = f" · shared prefixes save {d.shared:.0%} of the tokens" if d.shared else ""
    if d["group_prefixes"]:
        shared += f", {d.shared_at_random:.0%} without groups"
    head = setup.base.head
    task = "" if head == LANGUAGE_MODEL else f"{head.task} ({head.reason}) · "
    what = f"{setup.lora.described} on {len(targets.targets)} modules" if targets.targets else d["method"]
    return (
        f"{task}{what} · "
        f"{share_line(targets.trainable, targets.total)} · lr {d['lr']:g} · {d['max_steps']} steps · {minutes} · "
        f"{setup.memory.total / 2**30:.1f} of {total / 2**30:.0f} GB{shared}"
        f"{setup.spread.words()}"
    )


def _note_spread(base: Base, decisions: Decisions, spread: Spread) -> None:
    decisions.values["shard"], decisions.reasons["shard"] = "on" if spread.sharded else "off", spread.reason
    if spread.sharded and base.quant is not None:
        raise ConfigError(f"shard: weights in few bits cannot be divided ({base.quant})", hint="--shard off")
    if spread.processes.count > 1 and base.head.task == FEATURES:
        raise ConfigError("a step's pairs are compared with each other, by one process", hint="start one process")
    if spread.sharded and base.head != LANGUAGE_MODEL:
        raise ConfigError(f"shard: a model for {base.head.task} is not put together again here", hint="--shard off")
    if spread.sharded and not units_of(base.model):
        raise ConfigError("shard: this family does not name its layers", hint="--shard off")


def _decide_packing(model: Any, decisions: Decisions) -> None:
    if decisions.values.get("pack") is False:
        return
    task = decisions.task
    why_not = why_not_packed(model) if DATA_TASKS[task].packed else f"each row is read by itself in {task}"
    if why_not is None:
        decisions.decide("pack", True, "tried: two packed rows give what they give alone")
    elif decisions.values.get("pack"):
        raise ConfigError(f"pack: this model cannot take packed rows: {why_not}", hint="leave --pack out to pad rows")
    else:
        decisions.decide("pack", False, f"rows are padded: {why_not}")


def _decide_sharing(model: Any, decisions: Decisions, rows: Sequence[Rendered]) -> Order:
    """Shared prefixes, and the order of the rows: in groups where that saves a tenth of the tokens that are left.

    Both only where they save a tenth of the tokens of a step, and the model computes the same with them.
    """
    order = Order(len(rows), decisions["batch_size"], decisions["seed"])
    names = ("share_prefixes", "group_prefixes")
    wanted = [name for name in names if decisions.values.get(name)]
    why_not = "rows are padded" if not decisions["pack"] else None
    if why_not is not None and wanted:
        raise ConfigError(f"{wanted[0]}: rows are padded ({decisions.reasons['pack']})", hint="leave it out")
    if decisions.values.get("share_prefixes") is False:
        why_not = "prefixes are not shared"
    if why_not is not None:
        for name in names:
            decisions.decide(name, False, why_not)
        return order
    share, largest = _shared(rows, order)
    decisions.shared_at_random = share
    grouped = _decide_groups(decisions, rows, order, share)
    if grouped is not order:
        share, largest = _shared(rows, grouped)
    why_not = why_no_shared_prefixes(model) if wanted or share >= _WORTH else None
    if why_not is not None and wanted:
        flag = wanted[0].replace("_", "-")
        raise ConfigError(f"{wanted[0]}: this model cannot: {why_not}", hint=f"leave --{flag} out")
    why = f"the rows of a step begin alike in {share:.0%} of their tokens"
    decisions.decide("share_prefixes", why_not is None and (bool(wanted) or share >= _WORTH), why_not or why)
    if not decisions["share_prefixes"]:
        decisions.decide("group_prefixes", False, why_not or "prefixes are not shared")
        return order
    decisions.shared, decisions.step_tokens = share, largest
    return grouped


def _decide_groups(decisions: Decisions, rows: Sequence[Rendered], order: Order, at_random: float) -> Order:
    """The order in groups, where these are asked for or worth it; else the one given."""
    batch_size, wanted = decisions["batch_size"], decisions.values.get("group_prefixes")
    if wanted is False:
        return order
    if bundle_size(batch_size) < 2:
        why_not = f"a step of {batch_size} rows has no room for several groups"
        if wanted:
            raise ConfigError(f"group_prefixes: {why_not}", hint="--batch-size 4 is the least")
        decisions.decide("group_prefixes", False, why_not)
        return order
    grouped = replace(order, groups=groups_of(computed(row) for row in rows))
    share, _ = _shared(rows, grouped)
    saved = 1 - (1 - share) / (1 - at_random)
    why = f"the rows of a step begin alike in {share:.0%} of their tokens, {at_random:.0%} in random order"
    decisions.decide("group_prefixes", saved > _WORTH, why)
    return grouped if decisions["group_prefixes"] else order


def _shared(rows: Sequence[Rendered], order: Order) -> tuple[float, int]:
    """The share of tokens that steps of the first epoch compute once for several rows, and their largest tree's."""
    steps = range(0, order.steps_per_epoch, math.ceil(order.steps_per_epoch / _LOOKED_AT))
    counts = [sharing([computed(rows[i]) for i in order.step(step)]) for step in steps]
    return 1 - sum(tree for _, tree in counts) / sum(total for total, _ in counts), max(tree for _, tree in counts)


def _decide_fused(model: Any, decisions: Decisions) -> None:
    wanted = decisions.values.get("fused")
    if wanted is False:
        return
    why_not = why_not_fused(model)
    if why_not is not None and wanted:
        raise ConfigError(f"fused: {why_not}", hint="leave --fused out")
    by = f"tried: the fused blocks give what the stock ones give, by {kernels_of(model.device).named}"
    decisions.decide("fused", why_not is None, why_not or by)


def _decide_memory(
    base: Base,
    decisions: Decisions,
    prepared: Prepared,
    targets: TargetPlan,
    shape: Shape,
    optimizer: int,
    spread: Spread,
) -> MemoryEstimate:
    """The micro-batch: as many tokens as memory holds, at least the longest row; recompute where that is too much."""
    device = spread.device or base.device
    itemsize, fused = base.precision.dtype.itemsize, decisions["fused"]
    longest = max(row.needed for row in prepared.rows)
    held = BaseMemory.of(base.model, itemsize, base.quant, in_layers=units_of(base.model))
    room = spread.room(device)
    if device != base.device:  # it is not there yet
        room -= held.weights // spread.parts
    budget = int(room * _MEMORY_SHARE)

    def fits(recompute: bool) -> int:
        return max(0, budget) // sum(bytes_per_token(shape, targets, itemsize, recompute=recompute, fused=fused))

    recompute = decisions["recompute"] == "on" or (decisions["recompute"] == "auto" and fits(False) < longest)
    if decisions["recompute"] == "auto":
        decisions.values["recompute"] = "on" if recompute else "off"
        why = f"{fits(False):,} tokens fit in {budget / 2**30:.1f} GB without it, the longest row has {longest:,}"
        decisions.reasons["recompute"] = why
    # A prefix is computed once in each micro-batch: with shared ones a whole step at once gains, if memory has room.
    step_tokens = -(-decisions.step_tokens // spread.processes.count)
    enough = max(_ENOUGH_TOKENS.get(device.type, 2048), min(step_tokens, fits(recompute) // 2))
    tokens = max(longest, min(enough, fits(recompute)))
    why = f"the longest row has {longest:,}, memory holds {fits(recompute):,}, more than {enough:,} gain nothing"
    tokens = decisions.decide("micro_batch_tokens", tokens, why)
    tokens = min(tokens, decisions["batch_size"] * longest)
    scored = round(tokens * prepared.fit.supervised_tokens / prepared.fit.tokens)
    early = decisions["pack"] and ends_early(base.model)
    through = Pass(itemsize, tokens, scored, longest, recompute, fused, device.type, early)
    return estimate_memory(targets, shape, through, held, optimizer=optimizer, parts=spread.parts)


def _decide_rhythm(decisions: Decisions, prepared: Prepared) -> None:
    """When to validate and to write checkpoints, in steps."""
    steps = decisions["max_steps"]
    if prepared.val is None:
        if decisions["early_stop"]:
            raise ConfigError("early_stop needs held-out rows", hint="give some with --val")
    else:
        decisions.decide("eval_every", max(1, steps // 4), f"four times in {steps} steps")
    why = f"four times in {steps} steps, not more often than every 10 and not less often than every 500"
    decisions.decide("save_every", max(10, min(steps // 4, 500)), why)


def _seconds(base: Base, decisions: Decisions, prepared: Prepared, shape: Shape, spread: Spread) -> float:
    """How long the steps will take, from how long the base's own forward pass takes here and now.

    Of a base that is not yet where it will be, from how fast that device multiplies.
    """
    tokens = prepared.fit.tokens * decisions["max_steps"] * decisions["batch_size"] / len(prepared.rows)
    tokens *= 1 - decisions.shared
    forwards = RECOMPUTED_FORWARDS if decisions["recompute"] == "on" else STEP_FORWARDS
    if spread.device in (None, base.device):
        rate = forward_rate(base.model)
    else:
        rate = matmul_rate(spread.device, base.precision.dtype) / (2 * (shape.linears + shape.head))
    return float(tokens * forwards / (spread.processes.least(rate) * spread.processes.count))
