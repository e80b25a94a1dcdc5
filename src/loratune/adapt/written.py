"""A config as a file can hold it: what it means must survive sorted keys, peft's rules and another reader's presets."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

from torch import nn

from loratune.adapt.names import short_name
from loratune.adapt.plan import TargetPlan, plan_as_written
from loratune.config import ALL_LINEAR, NO_TARGETS, LoraConfig
from loratune.config.methods import CHOOSING, IA3, LORA, VERA, written_names
from loratune.config.patterns import first_match, name_matches
from loratune.lora import base_modules


def written(model: nn.Module, config: LoraConfig, target_plan: TargetPlan) -> LoraConfig:
    """The config that names the plan's modules, ranks and scales in a way that every reader understands alike."""
    if config.peft_type != LORA:
        return _of_other_method(model, config, target_plan)
    config = _of_parameters(config, target_plan)
    values: dict[str, Any] = {
        "target_modules": _names(model, config, target_plan),
        # peft finds the layout itself too, but warns where the file says otherwise.
        "fan_in_fan_out": any(target.kind == "Conv1D" for target in target_plan.modules) and not target_plan.stacks,
        "modules_to_save": _saved(model, config, target_plan),
        "layers_pattern": _lists(model, config, target_plan),
        "trainable_token_indices": _tokens(config, target_plan),
        **_patterns(model, config, target_plan),
    }
    return _counted_from_base(cast(LoraConfig, config.replace(**values)))


def _of_other_method(model: nn.Module, config: LoraConfig, target_plan: TargetPlan) -> LoraConfig:
    """What chooses among names and has no place in the method's file is written out: the names say which modules."""
    values: dict[str, Any] = {name: None for name in CHOOSING if name not in written_names(config.peft_type)}
    values["fan_in_fan_out"] = any(target.kind == "Conv1D" for target in target_plan.targets)
    values["modules_to_save"] = _saved(model, config, target_plan)
    if config.peft_type == VERA:
        values["layers_pattern"] = _lists(model, config, target_plan)
    plain = cast(LoraConfig, config.replace(**values))
    names = _names(model, plain, target_plan)
    inputs = _inputs(names, target_plan)
    found = plan_as_written(model, _naming(plain, names, inputs))
    if inputs is None or found.targets != target_plan.targets:
        names = tuple(sorted(target.path for target in target_plan.targets))
        inputs = tuple(sorted(target.path for target in target_plan.targets if target.on_input))
    return _naming(plain, names, inputs)


def _naming(config: LoraConfig, names: str | tuple[str, ...], inputs: tuple[str, ...] | None) -> LoraConfig:
    beside = {"feedforward_modules": inputs} if config.peft_type == IA3 else {}
    return cast(LoraConfig, config.replace(target_modules=names, **beside))


def _inputs(names: str | tuple[str, ...], target_plan: TargetPlan) -> tuple[str, ...] | None:
    """Of the names those of targets whose inputs are rescaled; None where they cannot tell these from the others.

    peft wants them among the names, and compares ends of paths without regard to dots.
    """
    on_input = {target.path: target.on_input for target in target_plan.targets}
    if isinstance(names, str):
        return None if any(on_input.values()) else ()
    telling = {name: {of for path, of in on_input.items() if path.endswith(name)} for name in names}
    found = tuple(name for name, kinds in telling.items() if kinds == {True})
    covered = {path for path in on_input if any(path.endswith(name) for name in found)}
    return found if covered == {path for path, of in on_input.items() if of} else None


def _of_parameters(config: LoraConfig, target_plan: TargetPlan) -> LoraConfig:
    """To other readers, layers and what is excluded say nothing of parameters: where they do here, names say it."""
    filtered = config.layers_to_transform is not None or config.exclude_modules is not None
    values: dict[str, Any] = {}
    if config.target_parameters and filtered:
        values["target_parameters"] = tuple(target.path for target in target_plan.stacks)
    if target_plan.stacks and not target_plan.modules:
        values.update(target_modules=NO_TARGETS, layers_to_transform=None, layers_pattern=None, exclude_modules=None)
    return cast(LoraConfig, config.replace(**values))


def _names(model: nn.Module, config: LoraConfig, target_plan: TargetPlan) -> str | tuple[str, ...]:
    """Presets and "all-linear" written out, as short names where these mean the same modules."""
    names = config.target_modules
    # peft refuses a pattern beside layers_to_transform.
    if isinstance(names, str) and names != ALL_LINEAR and config.layers_to_transform is None:
        return names
    if isinstance(names, tuple):
        return names
    paths = tuple(target.path for target in target_plan.modules)
    short = tuple(sorted(set(map(short_name, paths))))
    found = plan_as_written(model, config.replace(target_modules=short))
    same = found.targets == target_plan.targets and not found.problems
    return short if same else tuple(sorted(paths))


def _saved(model: nn.Module, config: LoraConfig, target_plan: TargetPlan) -> tuple[str, ...] | None:
    """The names given where every reader takes them for the same modules, full paths otherwise.

    peft compares ends of paths without regard to dots: to it "norm" is also every "input_layernorm".
    """
    names = []
    for name in config.modules_to_save or ():
        paths = [path for path in target_plan.saved if name_matches(name, path)]
        loosely = [path for path, _ in base_modules(model) if path.endswith(name)]
        names += [name] if paths and set(loosely) == set(paths) else paths
    missing = [path for path in target_plan.saved if not any(name_matches(name, path) for name in names)]
    return tuple(dict.fromkeys([*names, *missing])) or None


def _tokens(config: LoraConfig, target_plan: TargetPlan) -> Any:
    """By full path, which every reader takes for the same module; a list stays one, as it means the embedding."""
    if not isinstance(config.trainable_token_indices, dict):
        return config.trainable_token_indices
    return {part.path: part.tokens for part in target_plan.token_rows}


def _lists(model: nn.Module, config: LoraConfig, target_plan: TargetPlan) -> tuple[str, ...] | None:
    """The name of the list of layers where the model itself holds it: peft finds such a list by its name alone."""
    if config.layers_to_transform is None or config.layers_pattern is not None:
        return config.layers_pattern
    paths = [target.path.split(".") for target in target_plan.modules]
    if not any(path[1].isdigit() for path in paths):
        return None
    names = tuple(sorted({next(before for before, part in pairwise(path) if part.isdigit()) for path in paths}))
    same = plan_as_written(model, config.replace(layers_pattern=names)).targets == target_plan.targets
    return names if same else None


def _patterns(model: nn.Module, config: LoraConfig, target_plan: TargetPlan) -> dict[str, Any]:
    """The patterns in a file's order of keys; where the first match would then be another one, one for each module."""
    if len(config.rank_pattern) < 2 and len(config.alpha_pattern) < 2:
        return {}
    ordered = {
        "rank_pattern": dict(sorted(config.rank_pattern.items())),
        "alpha_pattern": dict(sorted(config.alpha_pattern.items())),
    }
    if plan_as_written(model, config.replace(**ordered)).targets == target_plan.targets:
        return ordered
    paths = [target.path for target in target_plan.targets]
    return {name: _exact(getattr(config, name), paths) for name in ordered}


def _exact(patterns: Mapping[str, float], paths: Sequence[str]) -> dict[str, float]:
    values = {path: first_match(patterns, path) for path in paths}
    return {f"^{re.escape(path)}": value for path, value in values.items() if value is not None}


def _counted_from_base(config: LoraConfig) -> LoraConfig:
    """An update that counts from a decomposition of W is written as a plain one: twice the rank, the same scale."""
    # The updates of these count from the base as it is, which is quantised for LoftQ.
    if config.init_lora_weights in ("loftq", "eva"):
        return cast(LoraConfig, config.replace(init_lora_weights=True))
    if not config.decomposes:
        return config
    # s = alpha / r, or alpha / √r: the alpha that keeps s when r doubles.
    more = math.sqrt(2) if config.use_rslora else 2
    return cast(
        LoraConfig,
        config.replace(
            init_lora_weights=True,
            r=2 * config.r,
            lora_alpha=more * config.lora_alpha,
            rank_pattern={pattern: 2 * r for pattern, r in config.rank_pattern.items()},
            alpha_pattern={pattern: more * alpha for pattern, alpha in config.alpha_pattern.items()},
        ),
    )
