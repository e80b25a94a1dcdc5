"""`LoraConfig`: what an adapter is. Field names are PEFT's, flags are the command line's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import ValidationInfo, field_validator

from loratune.config.methods import CALLED, LORA, VERA, VERA_RANK, Method, unfit
from loratune.config.patterns import ANCHORED, check_pattern, first_match
from loratune.config.peft_keys import DESCRIPTIVE, NEUTRAL, asks_for_something
from loratune.config.setting import Settings, setting
from loratune.config.tasks import TaskType
from loratune.errors import nearest

ALL_LINEAR = "all-linear"
# No low-rank terms, only biases or whole modules; the word that peft has for it.
NO_TARGETS = "dummy-target-modules"
# Starts by name; "pissa_niter_N" too, which approximates PiSSA's decomposition in N rounds.
INITS = ("gaussian", "swapped", "orthogonal", "pissa", "olora", "loftq", "eva")
# PEFT's `eva_config`, with its defaults: how many times its own rank a layer may get; the rest has one value here.
_EVA: dict[str, Any] = {
    "rho": 2.0, "tau": 0.99, "use_label_mask": True, "label_mask_value": -100, "whiten": False,
    "adjust_scaling_factors": True,
}  # fmt: skip
# Beyond any use; larger ones overflow memory or fp32.
_LARGEST_RANK = 2**16
_LARGEST_ALPHA = 1e9
_PISSA_ROUNDS = re.compile(r"pissa_niter_(\d+)")

_ADAPTER = "Adapter"


class LoraConfig(Settings):
    """The settings of one low-rank adapter; every wrong one is reported at once.

    Raises:
        ConfigError: with one line for each problem, and the nearest valid spelling of an unknown name.
    """

    peft_type: Method = setting(
        LORA, "the method: LORA; VERA = frozen random A and B shared by all layers, of which two vectors train "
        "(arXiv:2310.11454); IA3 = a trained factor for each feature (arXiv:2205.05638)", group=_ADAPTER,
    )  # fmt: skip
    r: int = setting(
        8, "rank of the update: ΔW = scale · B A with A (r, in) and B (out, r)", flag="rank", group=_ADAPTER,
        ge=1, le=_LARGEST_RANK,
    )  # fmt: skip
    lora_alpha: float = setting(
        16,
        "numerator of the scale: alpha / r, or alpha / √r with rsLoRA",
        flag="alpha",
        group=_ADAPTER,
        gt=0,
        le=_LARGEST_ALPHA,
    )
    lora_dropout: float = setting(
        0.0, "dropout on the input of A, in training only", flag="dropout", group=_ADAPTER, ge=0, lt=1
    )
    target_modules: str | tuple[str, ...] | None = setting(
        None,
        "modules to adapt: 'all-linear', names or dotted suffixes, or a regex for the full path",
        flag="targets",
        group=_ADAPTER,
    )
    target_parameters: tuple[str, ...] | None = setting(
        None,
        "parameters to adapt by themselves, by the ends of their names: stacked experts, such as "
        "mlp.experts.gate_up_proj; they stand alone with --targets none",
        flag="target-parameters",
        group=_ADAPTER,
    )
    exclude_modules: str | tuple[str, ...] | None = setting(
        None, "modules to leave alone, written like the targets", flag="exclude", group=_ADAPTER
    )
    layers_to_transform: tuple[int, ...] | None = setting(
        None, "indices of the layers to adapt; all when not given", flag="layers", group=_ADAPTER
    )
    layers_pattern: tuple[str, ...] | None = setting(None, "name of the list of layers, where it is not found", flag="")
    rank_pattern: dict[str, int] = setting({}, "another rank for paths that match a regex", flag="")
    alpha_pattern: dict[str, float] = setting({}, "another alpha for paths that match a regex", flag="")
    use_rslora: bool = setting(
        False, "scale by alpha / √r (rank-stabilised LoRA, arXiv:2312.03732)", flag="rslora", group=_ADAPTER
    )
    use_dora: bool = setting(
        False, "train the length of each weight row beside its direction (DoRA, arXiv:2402.09353)", flag="dora",
        group=_ADAPTER,
    )  # fmt: skip
    init_lora_weights: bool | str = setting(
        True,
        "start of A and B: true = A Kaiming uniform, gaussian = A from N(0, 1/r²), B zero in both; swapped = A zero; "
        "orthogonal; pissa, pissa_niter_N, olora = from the weight itself; loftq = from what quantising the base lost; "
        "eva = from what the layers are given in the first steps; false = both random",
        flag="init",
        group=_ADAPTER,
    )
    eva_config: dict[str, Any] | None = setting(None, "of init eva: {'rho': 1} keeps every rank as it is", flag="")
    d_initial: float = setting(0.1, "of VERA: where the vector between A and B starts", flag="", gt=0)
    projection_prng_key: int = setting(0, "of VERA: the seed of A and B", flag="", ge=0, lt=2**63)
    save_projection: bool = setting(True, "of VERA: whether A and B stand in the file, beside their seed", flag="")
    feedforward_modules: str | tuple[str, ...] | None = setting(
        None,
        "of IA3: targets whose inputs are rescaled, not their outputs; those of the family's preset when not given",
        flag="",
    )
    bias: Literal["none", "lora_only", "all"] = setting(
        "none", "biases that train too: those of adapted modules, or all of the model", group=_ADAPTER
    )
    lora_bias: bool = setting(False, "a trained bias behind B", flag="")
    modules_to_save: tuple[str, ...] | None = setting(
        None, "modules that train whole and are saved with the adapter", flag="save-modules", group=_ADAPTER
    )
    ensure_weight_tying: bool = setting(
        False, "modules_to_save brings along what is tied to them: both train as one and stay tied", group=_ADAPTER
    )
    trainable_token_indices: tuple[int, ...] | dict[str, tuple[int, ...]] | None = setting(
        None,
        "tokens whose rows of the embedding train whole (new ones, say) while the others stay; a tied head follows",
        flag="train-tokens",
        group=_ADAPTER,
    )
    fan_in_fan_out: bool = setting(
        False, "weights stored (in, out); found from the module, kept for PEFT's files", flag=""
    )
    task_type: TaskType | None = setting(
        None, "what the model is used for; found from the model and the rows", flag="task", group=_ADAPTER
    )

    @classmethod
    def prepare(cls, values: dict[str, Any], problems: list[str]) -> dict[str, Any]:
        """PEFT's keys at their neutral value ask for nothing; at another value they ask for what is not here."""
        asked = [key for key in values if key in NEUTRAL and asks_for_something(key, values[key])]
        problems += [f"{key}={values[key]!r}: not implemented, only {NEUTRAL[key]!r} is" for key in asked]
        kept = {key: value for key, value in values.items() if key not in NEUTRAL and key not in DESCRIPTIVE}
        found = super().prepare(kept, problems)
        problems += unfit(found, {name: field.default for name, field in cls.model_fields.items()})
        if found.get("peft_type") == VERA:
            found.setdefault("r", VERA_RANK)
        if found.get("target_parameters") and found.get("target_modules") in ([], (), set()):
            found["target_modules"] = NO_TARGETS  # as peft says that parameters stand alone
        if found.get("lora_bias") is True:
            # As in peft: what a bias behind B would mean is defined for the plain update only.
            if found.get("use_dora") is True:
                problems.append("lora_bias=True and use_dora=True cannot go together")
            if isinstance(found.get("init_lora_weights"), str):
                problems.append(
                    f"lora_bias=True and init_lora_weights={found['init_lora_weights']!r} cannot go together"
                )
        return found

    def rank_of(self, path: str) -> int:
        """The rank at a module path: the first matching pattern's, or `r`."""
        return int(first_match(self.rank_pattern, path) or self.r)

    def alpha_of(self, path: str) -> float:
        """The alpha at a module path: the first matching pattern's, or `lora_alpha`."""
        return first_match(self.alpha_pattern, path) or self.lora_alpha

    @property
    def described(self) -> str:
        """The method and its size in a few words."""
        if self.peft_type == LORA:
            return f"r={self.r} α={self.lora_alpha:g}"
        return f"{CALLED[self.peft_type]} r={self.r}" if self.peft_type == VERA else CALLED[self.peft_type]

    @property
    def eva_rho(self) -> float:
        """How many times its own rank a layer may get with init "eva"; 1 leaves ranks as they are."""
        return float((self.eva_config or _EVA)["rho"])

    @property
    def decomposes(self) -> bool:
        """Whether A and B start from a decomposition of the weight."""
        init = self.init_lora_weights
        return isinstance(init, str) and (init == "olora" or init.startswith("pissa"))

    @field_validator("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return value if value is None or isinstance(value, str) else _strings(value)

    @field_validator("target_parameters", mode="before")
    @classmethod
    def _parameters(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError("is a list of names, not one word")
        return value if value is None else _strings(value)

    @field_validator("layers_pattern", mode="before")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        return _strings([value]) if isinstance(value, str) else value if value is None else _strings(value)

    @field_validator("layers_to_transform", mode="before")
    @classmethod
    def _indices(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            value = [value]
        if isinstance(value, Iterable) and not isinstance(value, str):
            value = tuple(value)
            if any(not isinstance(index, int) or index < 0 for index in value):
                raise ValueError("layer indices are whole numbers from 0")
        return value

    @field_validator("trainable_token_indices", mode="before")
    @classmethod
    def _tokens(cls, value: Any) -> Any:
        return known_tokens(value)

    @field_validator("lora_alpha", "lora_dropout", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("is not a number")
        return value

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _init(cls, value: Any) -> Any:
        return known_init(value)

    @field_validator("eva_config", mode="before")
    @classmethod
    def _eva(cls, value: Any) -> Any:
        return known_eva(value)

    @field_validator("modules_to_save", "target_parameters", "trainable_token_indices")
    @classmethod
    def _nothing_to_save(cls, value: Any) -> Any:
        return value or None

    @field_validator("target_modules", "exclude_modules", "feedforward_modules")
    @classmethod
    def _regex_compiles(cls, value: str | tuple[str, ...] | None, info: ValidationInfo) -> str | tuple[str, ...] | None:
        if isinstance(value, str) and value != ALL_LINEAR:
            check_pattern(value)
        if value in ((), "") and info.field_name != "feedforward_modules":
            raise ValueError("names nothing")
        return value

    @field_validator("fan_in_fan_out", mode="before")
    @classmethod
    def _unset_fan(cls, value: Any) -> Any:
        return False if value is None else value

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _pattern_keys(cls, value: Any) -> Any:
        if value is None:
            return {}
        if isinstance(value, Mapping):
            for key, number in value.items():
                check_pattern(str(key), ANCHORED)
                if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= _LARGEST_ALPHA:
                    raise ValueError(f"{key!r}: {number!r} is not a positive number up to {_LARGEST_ALPHA:g}")
        return value

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


def known_tokens(value: Any) -> Any:
    """Token indices as a tuple, or one by the name of a module."""
    if isinstance(value, Mapping):
        names = [name for name in value if not isinstance(name, str) or not name]
        if names:
            raise ValueError(f"{names[0]!r} is not a module name")
        return {name: _token_indices(tokens, f"{name!r}: ") for name, tokens in value.items()}
    return value if value is None else _token_indices(value, "")


def _token_indices(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple | set | frozenset):
        raise ValueError(f"{where}{value!r} is no list of token indices")
    tokens = tuple(sorted(value) if isinstance(value, set | frozenset) else value)
    wrong = [token for token in tokens if not isinstance(token, int) or isinstance(token, bool) or token < 0]
    if wrong:
        raise ValueError(f"{where}{wrong[0]!r} is not a token's index, a whole number from 0")
    twice = [token for token in tokens if tokens.count(token) > 1]
    if twice:
        raise ValueError(f"{where}{twice[0]} is named twice")
    if where and not tokens:
        raise ValueError(f"{where}names no token")
    return tokens


def known_eva(value: Any) -> Any:
    """`value` with what it leaves out, unless it asks for what is not here."""
    if not isinstance(value, Mapping):
        return value
    unknown = [f"{key!r} is no setting of it{nearest(str(key), list(_EVA))}" for key in value if key not in _EVA]
    fixed = [
        f"{key}={given!r}: only {_EVA[key]!r} is implemented"
        for key, given in value.items()
        if key in _EVA and key != "rho" and given != _EVA[key]
    ]
    rho = value.get("rho", _EVA["rho"])
    if isinstance(rho, bool) or not isinstance(rho, int | float) or not 1 <= rho <= _LARGEST_RANK:
        fixed.append(f"rho={rho!r}: a number from 1")
    if unknown or fixed:
        raise ValueError("; ".join(unknown + fixed))
    return {**_EVA, **value}


def known_init(value: Any) -> Any:
    """`value`, unless it is a word that names no initialisation."""
    rounds = _PISSA_ROUNDS.fullmatch(value) if isinstance(value, str) else None
    if not isinstance(value, str) or value in INITS or (rounds is not None and int(rounds[1]) > 0):
        return value
    names = ", ".join(map(repr, INITS))
    raise ValueError(f"no such initialisation{nearest(value, INITS)}; there are True, False, {names}")


def _strings(value: Any) -> Any:
    """Lists and sets of names as a tuple without repeats; sets sorted, since their order is not the user's."""
    if isinstance(value, set | frozenset):
        value = sorted(value)
    if isinstance(value, list | tuple):
        bad = [item for item in value if not isinstance(item, str) or not item]
        if bad:
            raise ValueError(f"{bad[0]!r} is not a module name")
        return tuple(dict.fromkeys(value))
    return value
