"""A config as a file can hold it: what it means must survive sorted keys, peft's rules and another reader's presets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from loratune.adapt.plan import TargetPlan, first_match, plan
from loratune.config import ALL_LINEAR, LoraConfig


def written(model: nn.Module, config: LoraConfig, target_plan: TargetPlan) -> LoraConfig:
    """The config that names the plan's modules, ranks and scales in a way that every reader understands alike."""
    values: dict[str, Any] = {
        "target_modules": _names(model, config, target_plan),
        # peft finds the layout itself too, but warns where the file says otherwise.
        "fan_in_fan_out": any(target.kind == "Conv1D" for target in target_plan.targets),
    }
    return cast(LoraConfig, config.replace(**values, **_patterns(model, config, target_plan)))


def _names(model: nn.Module, config: LoraConfig, target_plan: TargetPlan) -> str | tuple[str, ...]:
    """Presets and "all-linear" written out, as short names where these mean the same modules."""
    names = config.target_modules
    # peft refuses a pattern beside layers_to_transform.
    if isinstance(names, str) and names != ALL_LINEAR and config.layers_to_transform is None:
        return names
    if isinstance(names, tuple):
        return names
    paths = tuple(target.path for target in target_plan.targets)
    short = tuple(sorted({path.rpartition(".")[2] for path in paths}))
    same = plan(model, config.replace(target_modules=short)).targets == target_plan.targets
    return short if same else tuple(sorted(paths))


def _patterns(model: nn.Module, config: LoraConfig, target_plan: TargetPlan) -> dict[str, Any]:
    """The patterns in a file's order of keys; where the first match would then be another one, one for each module."""
    if len(config.rank_pattern) < 2 and len(config.alpha_pattern) < 2:
        return {}
    ordered = {
        "rank_pattern": dict(sorted(config.rank_pattern.items())),
        "alpha_pattern": dict(sorted(config.alpha_pattern.items())),
    }
    if plan(model, config.replace(**ordered)).targets == target_plan.targets:
        return ordered
    paths = [target.path for target in target_plan.targets]
    return {name: _exact(getattr(config, name), paths) for name in ordered}


def _exact(patterns: Mapping[str, float], paths: Sequence[str]) -> dict[str, float]:
    values = {path: first_match(patterns, path) for path in paths}
    return {f"^{re.escape(path)}": value for path, value in values.items() if value is not None}
