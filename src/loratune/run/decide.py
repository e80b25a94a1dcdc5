"""What a run decides where the user said nothing: each value with the sentence that explains it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loratune.adapt import preset_of
from loratune.config import LoraConfig, TrainConfig
from loratune.config.methods import IA3, VERA, VERA_RANK
from loratune.config.tasks import CAUSAL_LM
from loratune.data.fit import Fit
from loratune.data.pack import Layout
from loratune.data.tasks import DATA_TASKS
from loratune.errors import ConfigError
from loratune.training.optimizer import OPTIMIZERS, OptimizerKind

GIVEN, DEFAULT = "given", "default"

_RANK_FLOOR, _RANK_CEILING = 16, 256
_SMALL_DATA = 500_000
# How many times full fine-tuning's rate a method learns at; ten where nothing else is said.
_RATES = {"full": 1, "vera": 100, "ia3": 100}


@dataclass
class Decisions:
    """Resolved settings by name, each with its reason, in the order they were decided.

    Attributes:
        shared: the share of a step's tokens that shared prefixes save.
        shared_at_random: the same if rows met in random order.
        step_tokens: tokens of the largest step that was looked at for shared prefixes; 0 where they are not used.
    """

    config: TrainConfig
    values: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    shared: float = 0.0
    shared_at_random: float = 0.0
    step_tokens: int = 0

    def __post_init__(self) -> None:
        for name in TrainConfig.names():
            value = getattr(self.config, name)
            if value is not None:
                given = name in self.config.model_fields_set
                self.values[name], self.reasons[name] = value, GIVEN if given else DEFAULT

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    @property
    def task(self) -> str:
        """What the run is for; a causal LM until something else is decided."""
        return str(self.values.get("task_type", CAUSAL_LM))

    @property
    def layout(self) -> Layout:
        """How rows go through the model, once `pack` and `share_prefixes` are decided."""
        if not self["pack"]:
            return Layout.PADDED
        return Layout.TREE if self["share_prefixes"] else Layout.PACKED

    def decide(self, name: str, value: Any, reason: str) -> Any:
        """Take `value` unless the user gave one; returns what holds."""
        if self.reasons.get(name) != GIVEN:
            self.values[name], self.reasons[name] = value, reason
        return self.values[name]

    def to_json(self) -> dict[str, dict[str, Any]]:
        return {name: {"value": self.values[name], "reason": self.reasons[name]} for name in sorted(self.values)}


def decide_length(decisions: Decisions, context: int | None) -> int:
    """The longest row: the model's context where nobody says less."""
    if context is not None and decisions.values.get("max_length", 0) > context:
        raise ConfigError(
            f"max_length={decisions['max_length']} exceeds the model's context of {context} tokens",
            hint=f"--max-length {context}",
        )
    return int(
        decisions.decide("max_length", context or 4096, "the model's context" if context else "no context is known")
    )


def decide_val(decisions: Decisions, rows: int) -> Any:
    """A tenth of the rows, at most 200; none where it would be fewer than two."""
    count = min(200, rows // 10)
    if count < 2:
        return decisions.decide("val", 0, f"{rows} rows are too few to hold some out")
    return decisions.decide("val", count, f"a tenth of {rows} rows, at most 200")


def decide_training(decisions: Decisions, fit: Fit, hidden: int, parameters_per_rank: int) -> None:
    """Epochs, steps, rank, alpha, dropout and learning rate, in that order: later ones use earlier ones."""
    steps_per_epoch = math.ceil(fit.rows / decisions["batch_size"])
    decide_steps(decisions, fit.rows)
    if not parameters_per_rank:
        _decide_rate(decisions, hidden)
        return
    method = decisions["peft_type"]
    if method == IA3:
        _decide_rate(decisions, hidden)
        return
    if method == VERA:
        decisions.decide("r", VERA_RANK, "a rank of VeRA's costs one number a layer")
    else:
        r = _decide_rank(decisions, fit.supervised_tokens, parameters_per_rank)
        decisions.decide("use_rslora", False, "alpha / r keeps the update's size when the rank changes")
        decisions.decide("lora_alpha", 2 * r, "twice the rank")
    _decide_dropout(decisions, fit, steps_per_epoch)
    _decide_rate(decisions, hidden)


def _decide_dropout(decisions: Decisions, fit: Fit, steps_per_epoch: int) -> None:
    several = decisions["max_steps"] > steps_per_epoch
    if not DATA_TASKS[decisions.task].counted:
        decisions.decide("lora_dropout", 0.0, "masks are those of the encoder's tokens, and the decoder has others")
    elif decisions.values.get("target_parameters"):
        decisions.decide("lora_dropout", 0.0, "the update of a parameter has no input to drop from")
    elif several and fit.supervised_tokens < _SMALL_DATA:
        why = f"{fit.supervised_tokens:,} supervised tokens, seen more than once"
        decisions.decide("lora_dropout", 0.05, why)
    else:
        decisions.decide("lora_dropout", 0.0, "no row is seen twice" if not several else "much data")


def decide_optimizer(decisions: Decisions, device_type: str) -> OptimizerKind:
    """The one that was asked for, or what does the same where its kernels are missing."""
    kind = OPTIMIZERS[decisions["optimizer"]]
    if kind.instead and device_type != "cuda":
        why = f"{decisions['optimizer']} has kernels for CUDA only, and this is {device_type}; moments are in fp32"
        decisions.values["optimizer"], decisions.reasons["optimizer"] = kind.instead, why
    return OPTIMIZERS[decisions["optimizer"]]


def lora_config(decisions: Decisions) -> LoraConfig:
    """The adapter that the decisions describe."""
    names = [name for name in LoraConfig.names() if name in TrainConfig.model_fields and name in decisions.values]
    return LoraConfig(**{name: decisions[name] for name in names})


def decide_targets(decisions: Decisions, family: str | None) -> None:
    """(IA)³ rescales what its authors did, where a family is known; elsewhere the outputs of all linear layers."""
    if decisions["peft_type"] != IA3 or decisions.reasons["target_modules"] == GIVEN or not family:
        return
    targets, _ = preset_of(family, IA3)
    if targets:
        why = "keys, values and what the feed-forward block's last product is given (arXiv:2205.05638)"
        decisions.decide("target_modules", targets, why)


def learning_rate(hidden: int, method: str = "lora") -> tuple[float, str]:
    """The rate of a method as `--method` has it, and how it was found.

    10 × 5e-5 × (2000 / hidden)^0.78: LoRA's rate is about ten times full fine-tuning's and falls with the width.

    The fit over Llama and Qwen models of Schulman and Thinking Machines Lab, "LoRA Without Regret" (2025). What trains
    vectors alone learns at ten times that (docs/log.md).
    """
    factor = _RATES.get(method, 10)
    rate = factor * 5e-5 * (2000 / hidden) ** 0.78
    shown = "" if factor == 1 else f"{factor:g} × "
    return float(f"{rate:.2g}"), f"{shown}5e-5 × (2000 / {hidden})^0.78, from the model's width"


def decide_steps(decisions: Decisions, rows: int) -> int:
    """Optimizer steps: so many epochs that there are about a hundred."""
    steps_per_epoch = math.ceil(rows / decisions["batch_size"])
    if "max_steps" in decisions.values:
        decisions.decide("epochs", decisions["max_steps"] / steps_per_epoch, "from max_steps")
        return int(decisions["max_steps"])
    epochs = min(3, max(1, math.ceil(100 / steps_per_epoch)))
    why = f"{rows} rows make {steps_per_epoch} steps an epoch; about 100 steps are wanted, in at most 3 epochs"
    epochs = decisions.decide("epochs", epochs, why)
    why = f"{epochs:g} epochs of {steps_per_epoch} steps"
    return int(decisions.decide("max_steps", math.ceil(epochs * steps_per_epoch), why))


def _decide_rank(decisions: Decisions, supervised: int, per_rank: int) -> int:
    """The smallest power of two, from 16, whose parameters hold the data at 2 bits each and 1 bit a token."""
    r = _RANK_FLOOR
    while r < _RANK_CEILING and 2 * per_rank * r < supervised:
        r *= 2
    why = f"{per_rank * r:,} parameters hold about {2 * per_rank * r:,} bits, for {supervised:,} supervised tokens"
    return int(decisions.decide("r", r, why))


def _decide_rate(decisions: Decisions, hidden: int) -> None:
    if "lr" in decisions.values:
        return
    if decisions["optimizer"] == "sgd":
        raise ConfigError(f"lr: no rate is known for {decisions['optimizer']}", hint="give one with --lr")
    rate, why = learning_rate(hidden, decisions["method"])
    if decisions.values.get("use_rslora"):
        rate = float(f"{rate / math.sqrt(decisions['r']):.2g}")
        why += ", divided by √r because rsLoRA scales by α/√r"
    decisions.decide("lr", rate, why)


def keep_plan(decisions: Decisions, before: Mapping[str, Mapping[str, Any]]) -> None:
    """The micro-batch plan of the run that goes on, unless another one is asked for now: same plan, same bits."""
    for name in ("micro_batch_tokens", "recompute"):
        if decisions.reasons[name] != GIVEN:
            decisions.values[name], decisions.reasons[name] = before[name]["value"], before[name]["reason"]


def warmup_steps(warmup: float, steps: int) -> int:
    """A share of the steps, or a count, never all of them."""
    count = round(warmup * steps) if warmup < 1 else int(warmup)
    return min(count, max(0, steps - 1))


def describe(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each setting that was decided rather than given or left at its default."""
    return [
        f"{name} = {entry['value']}: {entry['reason']}"
        for name, entry in settings.items()
        if entry["reason"] not in (GIVEN, DEFAULT)
    ]
