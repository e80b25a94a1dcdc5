"""The target plan: what `attach` would adapt, with which rank, and why it would refuse. Nothing is changed here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from loratune.adapt.presets import TARGETS
from loratune.config import ALL_LINEAR, LoraConfig
from loratune.errors import TargetError, nearest
from loratune.lora import LoraLayer, adapter_prefixes, lora_parameters, patched_forward, scale_of
from loratune.quant import frozen_weight

_SHOWN_NAMES = 40
_HEADS = ("score", "classifier", "qa_outputs")


@dataclass(frozen=True, slots=True)
class Target:
    """One module to adapt. `path` is its dotted name; the update is scale · B A with A (r, in), B (out, r)."""

    path: str
    kind: str
    in_features: int
    out_features: int
    r: int
    scale: float

    @property
    def parameters(self) -> int:
        return lora_parameters(self.out_features, self.in_features, self.r)

    @property
    def frozen(self) -> int:
        """Elements of the weight that stays frozen."""
        return self.in_features * self.out_features


@dataclass(frozen=True, slots=True)
class TargetPlan:
    """What `attach(model, config)` would do.

    Attributes:
        targets: the modules that would be adapted, in the model's order.
        base_parameters: parameters of the model without adapters; tied ones count once.
        notes: decisions taken on the way, as sentences.
        problems: why attach would refuse; empty where it would not.
    """

    targets: tuple[Target, ...]
    base_parameters: int
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    hint: str = ""

    @property
    def trainable(self) -> int:
        return sum(target.parameters for target in self.targets)

    @property
    def total(self) -> int:
        return self.base_parameters + self.trainable

    @property
    def by_layer(self) -> dict[int, int]:
        """Trainable parameters in each layer of the model, by its index; targets outside the layers are not counted."""
        layers: dict[int, int] = {}
        for target in self.targets:
            index = layer_of(target.path)
            if index is not None:
                layers[index] = layers.get(index, 0) + target.parameters
        return layers

    def check(self) -> None:
        """Raise what attach would raise."""
        if self.problems:
            raise TargetError(self.problems, hint=self.hint)


def plan(model: nn.Module, config: LoraConfig) -> TargetPlan:
    """What `attach(model, config)` would do: modules, shapes, parameters, refusals. Works on the meta device."""
    return _Planner(model, config).plan()


class _Planner:
    def __init__(self, model: nn.Module, config: LoraConfig) -> None:
        self.config = config
        self.model = model
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.prefixes = adapter_prefixes(model)
        self.modules = {
            path: module
            for path, module in model.named_modules()
            if path and not (path + ".").startswith(self.prefixes)
        }
        # MultiheadAttention multiplies by its projection's weight itself: an adapter there would never be called.
        hidden = {
            f"{path}.out_proj" for path, module in self.modules.items() if isinstance(module, nn.MultiheadAttention)
        }
        self.linears = {
            path: module
            for path, module in self.modules.items()
            if path not in hidden and frozen_weight(module) is not None
        }

    def plan(self) -> TargetPlan:
        chosen = self._without_excluded(self._named())
        chosen = self._in_layers(chosen)
        ranks = self._pattern_values(chosen, self.config.rank_pattern)
        alphas = self._pattern_values(chosen, self.config.alpha_pattern)
        targets = [self._target(path, ranks.get(path), alphas.get(path)) for path in chosen]
        self._check_fan(targets)
        if not targets and not self.problems:
            self.problems.append("nothing is left to adapt")
        return TargetPlan(
            tuple(targets),
            sum(p.numel() for name, p in self.model.named_parameters() if not name.startswith(self.prefixes)),
            tuple(self.notes),
            tuple(self.problems),
            self._hint() if self.problems else "",
        )

    def _target(self, path: str, rank: float | None, alpha: float | None) -> Target:
        module = self.modules[path]
        weight = frozen_weight(module)
        assert weight is not None
        r = int(rank or self.config.r)
        if r > min(weight.in_features, weight.out_features):
            self.notes.append(
                f"{path}: rank {r} exceeds the weight's own {min(weight.in_features, weight.out_features)}"
            )
        if hasattr(module, "lora") and not isinstance(module, LoraLayer):
            self.problems.append(f"{path}: it has an attribute called 'lora' already, where the adapter would stand")
        if patched_forward(module):
            self.problems.append(f"{path}: its forward is replaced on the instance, which would hide the adapter")
        scale = scale_of(r, alpha or self.config.lora_alpha, self.config.use_rslora)
        return Target(path, weight.kind, weight.in_features, weight.out_features, r, scale)

    # -- which modules -------------------------------------------------------------------------------------------

    def _named(self) -> list[str]:
        wanted = self.config.target_modules
        if wanted is None:
            wanted = self._preset()
            if wanted is None:
                return []
        if wanted == ALL_LINEAR:
            heads = self._heads()
            return [path for path in self.linears if path not in heads]
        matched = self._matching(wanted, "target_modules")
        for path in matched:
            if path not in self.linears:
                kind = type(self.modules[path]).__name__
                self.problems.append(f"{path}: a {kind} cannot be adapted")
        return [path for path in matched if path in self.linears]

    def _preset(self) -> tuple[str, ...] | None:
        family = getattr(getattr(self.model, "config", None), "model_type", None)
        if family in TARGETS:
            self.notes.append(f"targets of the {family} preset: {', '.join(TARGETS[family])}")
            return TARGETS[family]
        self.problems.append(f"no preset of targets for {family or type(self.model).__name__}: name target_modules")
        return None

    def _heads(self) -> set[str]:
        """Paths that all-linear leaves alone: the output head, by identity, and heads of classification models."""
        find = getattr(self.model, "get_output_embeddings", None)
        head = find() if callable(find) else None
        heads = {path for path, module in self.modules.items() if module is head}
        if callable(find) and head is None and self.config.task_type != "CAUSAL_LM":
            heads |= {path for path in self.linears if path.split(".")[0] in _HEADS}
        return heads

    def _matching(self, wanted: str | tuple[str, ...], setting: str) -> list[str]:
        """Paths that the names match, in the model's order; each name that matches nothing is a problem."""
        if isinstance(wanted, str):
            matched = [path for path in self.modules if re.fullmatch(wanted, path)]
            if not matched:
                self.problems.append(f"{setting}: the pattern {wanted!r} matches no module")
            return matched
        found: set[str] = set()
        for name in wanted:
            paths = [path for path in self.modules if path == name or path.endswith("." + name)]
            if not paths:
                self.problems.append(f"{setting}: {name!r} matches no module{nearest(name, self._short_names())}")
            found.update(paths)
        return [path for path in self.modules if path in found]

    def _without_excluded(self, chosen: Sequence[str]) -> list[str]:
        if self.config.exclude_modules is None:
            return list(chosen)
        excluded = set(self._matching(self.config.exclude_modules, "exclude_modules"))
        return [path for path in chosen if path not in excluded]

    # -- layers and patterns -------------------------------------------------------------------------------------

    def _in_layers(self, chosen: list[str]) -> list[str]:
        wanted = self.config.layers_to_transform
        if wanted is None:
            if self.config.layers_pattern is not None:
                self.problems.append("layers_pattern is given without layers_to_transform")
            return chosen
        layers = {path: layer_of(path, self.config.layers_pattern) for path in chosen}
        present = {index for index in layers.values() if index is not None}
        for index in wanted:
            if index not in present:
                shown = f"0 to {max(present)}" if present else "none"
                self.problems.append(f"layers_to_transform: no target in layer {index} (layers found: {shown})")
        return [path for path in chosen if layers[path] in wanted]

    def _pattern_values(self, chosen: Sequence[str], patterns: dict[str, int] | dict[str, float]) -> dict[str, float]:
        """The value of the first pattern that matches each path: a regex for its end, anchored at dots."""
        for pattern in patterns:
            if not any(_matches(pattern, path) for path in chosen):
                self.problems.append(f"pattern {pattern!r} matches no adapted module")
        values = {path: first_match(patterns, path) for path in chosen}
        return {path: value for path, value in values.items() if value is not None}

    def _check_fan(self, targets: Sequence[Target]) -> None:
        if self.config.fan_in_fan_out and any(target.kind == "Linear" for target in targets):
            self.notes.append("fan_in_fan_out=True does not hold for Linear modules; the stored layout is used")

    # -- messages ------------------------------------------------------------------------------------------------

    def _short_names(self) -> list[str]:
        return list(dict.fromkeys(path.rpartition(".")[2] for path in self.linears))

    def _hint(self) -> str:
        names = self._short_names()
        more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
        return (
            f"linear modules of this model: {', '.join(names[:_SHOWN_NAMES])}{more}"
            if names
            else "it has no linear modules"
        )


def layer_of(path: str, lists: tuple[str, ...] | None = None) -> int | None:
    """The index in the outermost list of layers on the path: the first number, not an expert's further in."""
    for before, part in pairwise(path.split(".")):
        if part.isdigit() and (lists is None or before in lists):
            return int(part)
    return None


def first_match(patterns: Mapping[str, float], path: str) -> float | None:
    """The value of the first pattern that matches the path's end."""
    return next((value for pattern, value in patterns.items() if _matches(pattern, path)), None)


def _matches(pattern: str, path: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", path) is not None
