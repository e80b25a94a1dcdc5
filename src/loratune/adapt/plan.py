"""The target plan: what `attach` would adapt, with which rank, and why it would refuse. Nothing is changed here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from torch import nn

from loratune.adapt.compiled import compiled_problems, inside_compiled
from loratune.adapt.forms import form_notes, form_problems, keeps_original, model_problems
from loratune.adapt.heads import new_heads, task_of_class, unnamed_heads, with_task
from loratune.adapt.names import last_names, layer_of, linears_there
from loratune.adapt.parameters import Stacked, named_parameters, parameter_problems, stacks_of
from loratune.adapt.presets import preset_of
from loratune.adapt.replacing import Replacement, plan_replacements, saved_modules
from loratune.adapt.target import Target
from loratune.adapt.token_rows import ReplacedRows, plan_token_rows
from loratune.config import ALL_LINEAR, NO_TARGETS, LoraConfig
from loratune.config.methods import IA3, LORA, VERA
from loratune.config.patterns import fully_matches, name_matches, pattern_matches
from loratune.errors import TargetError, nearest
from loratune.lora import (
    LoraLayer,
    base_modules,
    base_of,
    base_parameters,
    has_own,
    names_by_parameter,
    patched_forward,
    scale_of,
)
from loratune.quant import (
    adaptable,
    frozen_weight,
    output_head,
    values_in,
    why_not_adaptable,
    why_unreadable,
)


@dataclass(frozen=True, slots=True)
class TargetPlan:
    """What `attach(model, config)` would do.

    Attributes:
        targets: the modules that would be adapted, in the model's order, and then the parameters.
        base_parameters: parameters of the model without adapters; tied ones count once.
        replaced: what of the base the adapter has its own of (biases, modules trained whole, rows of tokens).
        saved: paths of the modules that train whole.
        notes: decisions taken on the way, as sentences.
        problems: why attach would refuse; empty where it would not.
    """

    targets: tuple[Target, ...]
    base_parameters: int
    replaced: tuple[Replacement, ...] = ()
    saved: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    hint: str = ""

    @property
    def trainable(self) -> int:
        return sum(t.parameters for t in self.targets) + sum(part.parameters for part in self.replaced)

    def sizes(self) -> Iterator[int]:
        """How many values each tensor that trains has."""
        for target in self.targets:
            yield from map(math.prod, target.shapes)
            yield from [target.out_features] * target.vectors
        for part in self.replaced:
            yield from part.numbers.values()

    @property
    def modules(self) -> tuple[Target, ...]:
        """Of `targets` those that are modules."""
        return tuple(target for target in self.targets if target.form.use != "stack")

    @property
    def stacks(self) -> tuple[Target, ...]:
        """Of `targets` those that are parameters."""
        return tuple(target for target in self.targets if target.form.use == "stack")

    @property
    def token_rows(self) -> tuple[ReplacedRows, ...]:
        """Of `replaced` the rows of tables, of which the rest stays the base's."""
        return tuple(part for part in self.replaced if isinstance(part, ReplacedRows))

    @property
    def whole(self) -> tuple[Replacement, ...]:
        """Of `replaced` the tensors that are replaced as a whole."""
        return tuple(part for part in self.replaced if not isinstance(part, ReplacedRows))

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

    def check(self, where: str = "") -> None:
        """Raise what attach would raise; `where` the config stands, where that is a file's."""
        if self.problems:
            named = [f"{where}: {problem}" for problem in self.problems] if where else self.problems
            raise TargetError(named, hint=self.hint)


def plan(model: nn.Module, config: LoraConfig) -> TargetPlan:
    """What `attach(model, config)` would do: modules, shapes, parameters, refusals. Works on the meta device.

    Raises:
        ConfigError: a pattern that takes too long, so that nobody knows what it matches.
    """
    model = inside_compiled(model)
    return _Planner(model, with_task(model, config), of_file=False).plan()


def plan_as_written(model: nn.Module, config: LoraConfig) -> TargetPlan:
    """The plan of a file's config: no task is found where it names none, and modules to save are named as in peft."""
    return _Planner(model, config, of_file=True).plan()


class _Planner:
    def __init__(self, model: nn.Module, config: LoraConfig, *, of_file: bool) -> None:
        self.config = config
        self.of_file = of_file
        self.model = model
        self.problems: list[str] = []
        self.notes: list[str] = []
        # Of (IA)³: paths whose inputs are rescaled.
        self.inputs: frozenset[str] = frozenset()
        self.modules = {path: module for path, module in base_modules(model) if path}
        self.linears = {
            path: module
            for path, module in self.modules.items()
            if frozen_weight(module) is not None and not self._attention_of(path)
        }

    def plan(self) -> TargetPlan:
        self.problems += model_problems(self.model, self.config, of_file=self.of_file)
        chosen, stacks = self._chosen()
        self._check_patterns([*chosen, *stacks])
        self.inputs = self._rescaled_inputs(chosen)
        targets = [self._target(path) for path in chosen] + [self._stacked(*named) for named in stacks.items()]
        self._check_fan(targets)
        saved = self._saved(self.problems, self.notes)
        self.problems += parameter_problems(self.config, stacks, chosen, saved, of_file=self.of_file)
        replaced = plan_replacements(
            self.modules, self.config, set(chosen), saved, problems=self.problems, notes=self.notes
        )
        taken = {*chosen, *(part.path for part in replaced if "weight" in part.numbers)}
        replaced += plan_token_rows(
            self.model, self.modules, self.config, taken, loosely=self.of_file, problems=self.problems
        )
        self.problems += compiled_problems([*chosen, *stacks, *(part.path for part in replaced)])
        if not targets and not replaced and not self.problems:
            self.problems.append("nothing is left to adapt")
        return self._found(targets, replaced, saved)

    def _found(self, targets: list[Target], replaced: list[Replacement], saved: list[str]) -> TargetPlan:
        return TargetPlan(
            tuple(targets),
            sum(parameter.numel() for _, parameter in base_parameters(self.model))
            + sum(values_in(module) for module in self.modules.values()),
            tuple(replaced),
            tuple(saved),
            tuple(self.notes),
            tuple(self.problems),
            linears_there(self.linears) if self.problems else "",
        )

    def _target(self, path: str) -> Target:
        module, config = self.modules[path], self.config
        weight = adaptable(module)
        assert weight is not None
        r = config.rank_of(path)
        self.problems += [f"{path}: {why}" for why in form_problems(weight.form, config, r, of_file=self.of_file)]
        self.notes += [f"{path}: {what}" for what in form_notes(module, weight.form, config)]
        if weight.form.use == "lookup":
            self._note_tied(path)
        if config.peft_type == LORA:
            self._check_rank(path, r, min(weight.in_features, weight.out_features))
        if config.init_lora_weights == "loftq" and not self.of_file and not keeps_original(module):
            self.problems.append(f"{path}: init='loftq' starts from what quantising the base lost, which is not known")
        if (why_not := why_unreadable(module)) is not None:
            self.problems.append(f"{path}: {why_not}")
        if has_own(module, "lora") and not isinstance(module, LoraLayer):
            self.problems.append(f"{path}: it has an attribute called 'lora' already, where the adapter would stand")
        if patched_forward(module):
            self.problems.append(f"{path}: its forward is replaced on the instance, which would hide the adapter")
        sizes = path, weight.kind, weight.in_features, weight.out_features
        if config.peft_type == IA3:
            return Target(*sizes, 0, 1.0, form=weight.form, method=IA3, on_input=path in self.inputs)
        if config.peft_type == VERA:
            return Target(*sizes, r, 1.0, form=weight.form, method=VERA)
        scale = scale_of(r, config.alpha_of(path), config.use_rslora)
        return Target(*sizes, r, scale, int(config.lora_bias) + int(config.use_dora), weight.form)

    def _check_rank(self, path: str, r: int, least: int) -> None:
        init = self.config.init_lora_weights
        if r > least and self.config.decomposes:
            self.problems.append(f"{path}: its weight has no {r} directions for init={init!r}")
        elif r > least:
            self.notes.append(f"{path}: rank {r} exceeds the weight's own {least}")
        if r % 2 and init == "orthogonal":
            self.problems.append(f"{path}: init='orthogonal' needs an even rank, not {r}")

    def _rescaled_inputs(self, chosen: Sequence[str]) -> frozenset[str]:
        """Of the targets those that the config calls feed-forward ones; as peft, those of the preset without a word."""
        wanted = self.config.feedforward_modules
        if self.config.peft_type != IA3:
            return frozenset()
        if wanted is None:
            names = preset_of(self._family(), IA3)[1]
            return frozenset(path for path in chosen if any(name_matches(name, path) for name in names))
        if self.of_file and isinstance(wanted, tuple):  # to peft they are ends of paths, whatever stands before them
            return frozenset(path for path in chosen if path.endswith(wanted))
        matched = set(self._matching(wanted, "feedforward_modules")) if wanted else set()
        beyond = sorted(matched.difference(chosen))
        if beyond:
            self.problems.append(f"feedforward_modules: {beyond[0]} is no target")
        return frozenset(matched.intersection(chosen))

    def _stacked(self, path: str, stack: Stacked) -> Target:
        config, weight = self.config, stack.weight
        r = config.rank_of(path)
        self._check_rank(path, r, min(weight.in_features, weight.out_features))
        scale = scale_of(r, config.alpha_of(path), config.use_rslora)
        inner, outer = weight.in_features, weight.out_features
        return Target(path, stack.kind, inner, outer, r, scale, form=stack.form, inside=stack.filed)

    def _note_tied(self, path: str) -> None:
        """An embedding's update is not the head's that shares its table."""
        owners = names_by_parameter(self.modules.items())[id(self.modules[path]._parameters["weight"])]
        others = [name for name in owners if name != f"{path}.weight"]
        if others:
            self.notes.append(
                f"{path}: its table is {', '.join(others)} too, which stays the base's, and no merge can be"
            )

    # -- which modules -------------------------------------------------------------------------------------------

    def _chosen(self) -> tuple[list[str], dict[str, Stacked]]:
        """Modules, and parameters by full name. In a file only modules are filtered by what they are in, as in peft."""
        modules = self._named()
        excluded = set(self._matching(self.config.exclude_modules, "exclude_modules"))
        modules = [path for path in modules if path not in excluded]
        names = named_parameters(self.modules, self.config, self.problems)
        if self.of_file:
            modules = self._in_layers(modules) if modules or not names else []
        else:
            kept = [full for full in names if full.rpartition(".")[0] not in excluded]
            within = set(self._in_layers([*modules, *kept]))
            modules, names = ([path for path in some if path in within] for some in (modules, kept))
        return modules, stacks_of(self.model, self.modules, names, self.problems)

    def _named(self) -> list[str]:
        wanted = self.config.target_modules
        if wanted is None and self.config.target_parameters:
            return []  # they stand alone
        if wanted is None:
            wanted = self._preset()
            if wanted is None:
                return []
        if wanted == NO_TARGETS:
            return []
        if wanted == ALL_LINEAR:
            left_alone = self._left_alone()
            return [path for path in self.linears if path not in left_alone]
        matched = self._matching(wanted, "target_modules")
        against = {path: why for path in matched if (why := self._why_not(path))}
        self.problems += [f"{path}: {why}" for path, why in against.items()]
        return [path for path in matched if path not in against]

    def _why_not(self, path: str) -> str:
        """What stands against adapting a module; empty where nothing does."""
        module = self._attention_of(path) or self.modules[path]
        return why_not_adaptable(module, base_of(type(module)))

    def _attention_of(self, path: str) -> nn.Module | None:
        """The MultiheadAttention whose projection it is: that multiplies by its weight itself, and never calls it."""
        parent, _, name = path.rpartition(".")
        module = self.modules.get(parent)
        return module if name == "out_proj" and isinstance(module, nn.MultiheadAttention) else None

    def _preset(self) -> tuple[str, ...] | None:
        family = self._family()
        targets, _ = preset_of(family, self.config.peft_type)
        if targets:
            self.notes.append(f"targets of the {family} preset: {', '.join(targets)}")
            return targets
        self.problems.append(f"no preset of targets for {family}: name target_modules")
        return None

    def _family(self) -> str:
        return getattr(getattr(self.model, "config", None), "model_type", None) or type(self.model).__name__

    def _left_alone(self) -> set[str]:
        """Paths that all-linear leaves alone: the output head, new heads, and what trains whole anyway."""
        head = output_head(self.model)
        alone = {path for path in self.linears if self.modules[path] is head}
        saved = self._saved([], [])  # its problems are reported where it is planned
        heads = (new_heads(self.model, task) for task in (self.config.task_type, task_of_class(self.model)))
        unnamed = unnamed_heads(self.model)
        self.notes += [
            f"{path}: left as it is; if it is new, modules_to_save trains it whole"
            for path in unnamed
            if path not in saved
        ]
        roots = (*saved, *unnamed, *chain.from_iterable(heads))
        return alone | {path for path in self.linears if any(path == r or path.startswith(r + ".") for r in roots)}

    def _saved(self, problems: list[str], notes: list[str]) -> list[str]:
        return saved_modules(
            self.model, self.modules, self.config, loosely=self.of_file, problems=problems, notes=notes
        )

    def _matching(self, wanted: str | tuple[str, ...] | None, setting: str) -> list[str]:
        """Paths that the names match, in the model's order; each name that matches nothing is a problem."""
        if isinstance(wanted, str):
            matched = [path for path in self.modules if fully_matches(wanted, path)]
            if not matched:
                self.problems.append(f"{setting}: the pattern {wanted!r} matches no module")
            return matched
        found: set[str] = set()
        for name in wanted or ():
            paths = [path for path in self.modules if name_matches(name, path)]
            if not paths:
                known = last_names(path for path, module in self.modules.items() if adaptable(module) is not None)
                self.problems.append(f"{setting}: {name!r} matches no module{nearest(name, known)}")
            found.update(paths)
        return [path for path in self.modules if path in found]

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

    def _check_patterns(self, chosen: Sequence[str]) -> None:
        for pattern in (*self.config.rank_pattern, *self.config.alpha_pattern):
            if not any(pattern_matches(pattern, path) for path in chosen):
                self.problems.append(f"pattern {pattern!r} matches no adapted module")

    def _check_fan(self, targets: Sequence[Target]) -> None:
        if self.config.fan_in_fan_out and any(target.kind == "Linear" for target in targets):
            self.notes.append("fan_in_fan_out=True does not hold for Linear modules; the stored layout is used")
