"""`TrainConfig`: every option of `loratune train`. `None` means: decide from the model and the data, and say why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import field_validator

from loratune.config.lora import ALL_LINEAR, NO_TARGETS, LoraConfig, known_init, known_tokens
from loratune.config.methods import IA3, LORA, VERA, Method, unfit
from loratune.config.setting import Settings, like, setting

_RUN, _DATA, _ADAPTER, _OPTIMISATION, _MACHINE = "Run", "Data", "Adapter", "Optimisation", "Machine"

# What each method stands for; it is expanded into these settings, and the record holds them.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "qlora": {"quant": "nf4"},
    "vera": {"peft_type": VERA},
    "ia3": {"peft_type": IA3},
    "full": {"target_modules": NO_TARGETS, "ensure_weight_tying": True},
    "bitfit": {"target_modules": NO_TARGETS, "bias": "all"},
}
# What a method without low-rank terms has no use for.
_OF_LOW_RANK = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "layers_to_transform",
                 "lora_plus_ratio", "target_parameters")  # fmt: skip
_TASK = Literal["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"]
_METHOD = Literal["lora", "rslora", "dora", "pissa", "qlora", "vera", "ia3", "full", "bitfit"]


class TrainConfig(Settings):
    """The settings of one training run, as given: those not given are decided by the run and recorded with reasons.

    Raises:
        ConfigError: with one line for each problem.
    """

    out: str | None = setting(None, "run folder; runs/NAME when not given", group=_RUN)
    seed: int = setting(
        0, "seed of the adapter's start, the data order and the dropout masks", group=_RUN, ge=0, lt=2**63
    )
    val: float | int | str | None = setting(
        None, "held-out rows: a share below 1, a count, or a file; 0 for none", group=_RUN
    )
    eval_every: int | None = setting(None, "validate every so many steps", group=_RUN, ge=1)
    early_stop: int = setting(
        0, "stop after so many validations without a better loss, and keep the best adapter; 0 never", group=_RUN, ge=0
    )
    save_every: int | None = setting(None, "write a checkpoint every so many steps", group=_RUN, ge=1)
    keep: int = setting(2, "checkpoints to keep", group=_RUN, ge=1)
    samples: int = setting(4, "prompts whose answers of base and tuned model are kept; 0 for none", group=_RUN, ge=0)
    checks: Literal["full", "fast", "off"] = setting(
        "full", "self-checks before and after training; fast leaves out overfitting a batch and merging", group=_RUN
    )
    resume: Literal["auto", "never"] = setting(
        "auto", "continue the unfinished run in the folder, or refuse", group=_RUN
    )
    log_with: tuple[str, ...] = setting(
        (), "trackers besides metrics.jsonl: tensorboard, wandb, mlflow, trackio", group=_RUN
    )

    loss: Literal["assistant", "completion", "all"] = setting(
        "assistant", "tokens that are learned: every answer, the last answer, or all", group=_DATA
    )
    columns: dict[str, str] = setting({}, "names of the data's columns: prompt=question,completion=answer", group=_DATA)
    max_length: int | None = setting(None, "longest row in tokens", group=_DATA, ge=2)
    overlong: Literal["error", "drop", "truncate"] = setting("error", "what happens to longer rows", group=_DATA)
    pack: bool | None = setting(None, "rows side by side without padding, each attending to itself alone", group=_DATA)
    share_prefixes: bool | None = setting(
        None, "what rows of a step begin with in common goes through the model once", group=_DATA
    )
    group_prefixes: bool | None = setting(
        None, "rows that begin alike are drawn into the same step, a few of several groups at random", group=_DATA
    )

    method: _METHOD = setting(
        "lora", "preset of what is trained: low-rank adapters of some kind, vectors beside frozen factors (vera) or at "
        "features (ia3), biases (bitfit), or all of it (full)",
        group=_ADAPTER,
    )  # fmt: skip
    peft_type: Method = like(LoraConfig, "peft_type", LORA)
    task_type: _TASK | None = like(LoraConfig, "task_type", None)
    r: int | None = like(LoraConfig, "r", None)
    lora_alpha: float | None = like(LoraConfig, "lora_alpha", None)
    lora_dropout: float | None = like(LoraConfig, "lora_dropout", None)
    target_modules: str | tuple[str, ...] = like(LoraConfig, "target_modules", ALL_LINEAR)
    target_parameters: tuple[str, ...] | None = like(LoraConfig, "target_parameters", None)
    exclude_modules: str | tuple[str, ...] | None = like(LoraConfig, "exclude_modules", None)
    layers_to_transform: tuple[int, ...] | None = like(LoraConfig, "layers_to_transform", None)
    use_rslora: bool | None = like(LoraConfig, "use_rslora", None)
    use_dora: bool = like(LoraConfig, "use_dora", False)
    init_lora_weights: bool | str = like(LoraConfig, "init_lora_weights", True)
    bias: Literal["none", "lora_only", "all"] = like(LoraConfig, "bias", "none")
    modules_to_save: tuple[str, ...] | None = like(LoraConfig, "modules_to_save", None)
    ensure_weight_tying: bool = like(LoraConfig, "ensure_weight_tying", False)
    trainable_token_indices: tuple[int, ...] | dict[str, tuple[int, ...]] | None = like(
        LoraConfig, "trainable_token_indices", None
    )

    epochs: float | None = setting(None, "passes over the training rows", group=_OPTIMISATION, gt=0)
    max_steps: int | None = setting(None, "optimizer steps, whatever the epochs say", group=_OPTIMISATION, ge=1)
    batch_size: int = setting(8, "examples an optimizer step", group=_OPTIMISATION, ge=1)
    lr: float | None = setting(None, "peak learning rate", group=_OPTIMISATION, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = setting(
        "cosine", "learning rate after warm-up", group=_OPTIMISATION
    )
    warmup: float | int = setting(0.05, "warm-up: a share of the steps below 1, or a count", group=_OPTIMISATION, ge=0)
    lora_plus_ratio: float | None = setting(
        None, "B learns at so many times the rate (LoRA+)", group=_OPTIMISATION, gt=0
    )
    weight_decay: float = setting(0.0, "decoupled weight decay of A and B", group=_OPTIMISATION, ge=0)
    clip: float = setting(1.0, "largest norm of the gradient; 0 for no clipping", group=_OPTIMISATION, ge=0)
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "sgd"] = setting(
        "adamw", "adamw; on CUDA also with moments in eight bits, or paged; or sgd with momentum 0.9",
        group=_OPTIMISATION,
    )  # fmt: skip

    micro_batch_tokens: int | None = setting(
        None, "tokens that go through the model at once; changes memory, never the result", group=_MACHINE, ge=1
    )
    recompute: Literal["auto", "on", "off"] = setting(
        "auto", "recompute activations in the backward pass; auto only where memory asks for it", group=_MACHINE
    )
    fused: bool | None = setting(
        None,
        "blocks that compute the same faster, with less kept for the backward pass, in place of the family's",
        group=_MACHINE,
    )
    dtype: Literal["auto", "bf16", "fp32"] = setting(
        "auto", "the base's dtype; bf16 where the hardware has it", group=_MACHINE
    )
    quant: Literal["nf4", "int8"] | None = setting(
        None, "keep the base's linear layers in four bits (nf4) or eight (int8); A and B stay in fp32", group=_MACHINE
    )
    shard: Literal["auto", "on", "off"] = setting(
        "auto", "several processes: each keeps a part of every weight (FSDP2), not a copy; auto where memory or "
        "accelerate's launch asks for it", group=_MACHINE,
    )  # fmt: skip
    device: str | None = setting(None, "cpu, cuda, cuda:1, mps; the best one when not given", group=_MACHINE)

    @field_validator("log_with", mode="before")
    @classmethod
    def _trackers(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str) else value

    @field_validator(
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "modules_to_save",
        mode="before",
    )
    @classmethod
    def _lists(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("trainable_token_indices", mode="before")
    @classmethod
    def _tokens(cls, value: Any) -> Any:
        return known_tokens(value)

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _init(cls, value: Any) -> Any:
        return known_init(value)

    @field_validator("warmup", "val")
    @classmethod
    def _share_or_count(cls, value: Any) -> Any:
        if isinstance(value, bool) or (isinstance(value, float) and value >= 1 and value != int(value)):
            raise ValueError("a share below 1 or a whole number")
        if isinstance(value, int | float) and value < 0:
            raise ValueError("is negative")
        return int(value) if isinstance(value, float) and value >= 1 else value

    @classmethod
    def prepare(cls, values: dict[str, Any], problems: list[str]) -> dict[str, Any]:
        """Expand the method; a setting given beside it that says otherwise is a contradiction."""
        found = super().prepare(values, problems)
        method = str(found.get("method", "lora"))
        means = METHODS.get(method, {})
        if "peft_type" in found:  # what the method says, too
            means = {"peft_type": LORA, **means}
        for name, implied in means.items():
            given = found.get(name)
            if given is not None and given != implied:
                problems.append(f"{name}={given!r} contradicts method={method!r}, which means {name}={implied!r}")
            found[name] = implied
        problems += _unfit(found)
        own = cls.model_fields
        defaults = {name: own[name].default for name in LoraConfig.names() if name in own}
        problems += unfit({name: value for name, value in found.items() if value is not None}, defaults)
        if found.get("group_prefixes") is True and found.get("share_prefixes") is False:
            problems.append("group_prefixes=True contradicts share_prefixes=False: only shared prefixes gain by groups")
        return found


def _unfit(found: dict[str, Any]) -> Iterator[str]:
    """What the method and the base's format leave no place for."""
    method = found.get("method", "lora")
    if METHODS.get(str(method), {}).get("target_modules") == NO_TARGETS:
        given = [name for name in _OF_LOW_RANK if found.get(name) not in (None, False)]
        yield from (
            f"{name}={found[name]!r} is for low-rank adapters, and method={method!r} has none" for name in given
        )
    if method == "ia3" and found.get("lora_plus_ratio") is not None:
        yield f"lora_plus_ratio={found['lora_plus_ratio']!r} is for a B behind an A, and method='ia3' has one vector"
    if method in ("vera", "ia3") and found.get("weight_decay"):
        yield f"weight_decay={found['weight_decay']!r} is for matrices, and method={method!r} trains vectors alone"
    if method == "full" and found.get("quant") is not None:
        yield f"quant={found['quant']!r}: method='full' trains every weight, and a quantised one cannot be trained"
    if method == "full" and found.get("modules_to_save") is not None:
        yield "modules_to_save says which modules train whole: with method='full' all do"
    if method == "full" and found.get("trainable_token_indices") is not None:
        yield "trainable_token_indices says which rows train whole: with method='full' all do"
    if found.get("init_lora_weights") == "loftq" and found.get("quant") is None:
        yield "init_lora_weights='loftq' starts from what quantising the base lost: say quant='nf4', or method='qlora'"
