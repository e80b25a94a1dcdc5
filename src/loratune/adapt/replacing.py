"""Which tensors of the base an adapter has its own of: those of modules that train whole, and biases."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from loratune.adapt.heads import new_heads
from loratune.config import LoraConfig
from loratune.config.patterns import name_matches
from loratune.config.tasks import HEADS_OF_TASK
from loratune.errors import nearest
from loratune.lora import Adapting, has_own, names_by_parameter
from loratune.quant import QuantizedLinear, frozen_weight


@dataclass(frozen=True, slots=True)
class Replacement:
    """Tensors of one module that an adapter has its own of: `numbers` holds how many values each of them has.

    One that is tied to another of them counts there: it has none here.

    Attributes:
        multiplied: how many weights of a linear map they are, wherever they count.
    """

    path: str
    numbers: Mapping[str, int]
    multiplied: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.numbers)

    @property
    def parameters(self) -> int:
        return sum(self.numbers.values())

    def shown(self, name: str) -> str:
        """One of its tensors as a summary calls it, by the end of its path."""
        return f"{self.path.rpartition('.')[2]}.{name}"

    def full_names(self) -> Iterator[str]:
        return (f"{self.path}.{name}" for name in self.names)


def plan_replacements(
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    targets: Collection[str],
    saved: Sequence[str],
    *,
    problems: list[str],
    notes: list[str],
) -> list[Replacement]:
    """The tensors of saved modules and biases that train, in the model's order; `problems` gets what prevents it."""
    names: dict[str, list[str]] = {}
    for root in saved:
        inside = [path for path in modules if path == root or path.startswith(root + ".")]
        _check_saved(root, {path: modules[path] for path in inside}, targets, problems)
        for path in inside:
            names[path] = [name for name, parameter in modules[path]._parameters.items() if parameter is not None]
    biased = [path for path in _biased(modules, config, targets) if path not in names]
    if config.bias != "none" and not biased:
        notes.append(f"bias={config.bias!r}: no such module has a bias")
    names |= {path: ["bias"] for path in biased}
    ordered = [(path, tuple(names[path])) for path in modules if names.get(path)]
    for path, _ in ordered:
        if has_own(modules[path], "lora_replaced") and not isinstance(modules[path], Adapting):
            problems.append(f"{path}: it has an attribute called 'lora_replaced' already")
    _note_tied(modules, ordered, notes)
    if config.ensure_weight_tying:
        problems += [
            f"{path}: ensure_weight_tying is for modules_to_save, and the weight of this target is tied to {other}"
            for path in targets
            for other in _tied_to([path], modules)
        ]
    counted: set[int] = set()
    return [
        Replacement(
            path,
            _numbers(modules[path], own, counted if config.ensure_weight_tying else set()),
            _multiplied(modules[path]) if "weight" in own else 0,
        )
        for path, own in ordered
    ]


def _multiplied(module: nn.Module) -> int:
    weight = frozen_weight(module)
    return 0 if weight is None else weight.in_features * weight.out_features


def _numbers(module: nn.Module, names: tuple[str, ...], counted: set[int]) -> dict[str, int]:
    numbers = {}
    for name in names:
        parameter = module._parameters[name]
        if parameter is not None:
            numbers[name] = 0 if id(parameter) in counted else parameter.numel()
            counted.add(id(parameter))
    return numbers


def saved_modules(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    *,
    loosely: bool,
    problems: list[str],
    notes: list[str],
) -> list[str]:
    """Paths of the modules that train whole: those named, and the heads that the model's task added to its base.

    Args:
        loosely: names are ends of paths without regard to dots, as peft compares them.
    """
    heads = new_heads(model, config.task_type)
    explicit = config.target_modules if isinstance(config.target_modules, tuple) else ()
    found = dict.fromkeys(head for head in heads if head not in explicit)
    for name in config.modules_to_save or ():
        paths = [path for path in modules if (path.endswith(name) if loosely else name_matches(name, path))]
        if not paths and heads and name in HEADS_OF_TASK.get(config.task_type or "", ()):
            # peft lists both names for every classifier, of which a model has one.
            notes.append(f"modules_to_save: this model has no {name!r}, its head is {', '.join(heads)}")
        elif not paths:
            short = list(dict.fromkeys(path.rpartition(".")[2] for path in modules))
            problems.append(f"modules_to_save: {name!r} matches no module{nearest(name, short)}")
        found |= dict.fromkeys(paths)
    if config.ensure_weight_tying:
        tied = _tied_to(found, modules)
        if not tied:
            notes.append("ensure_weight_tying: no module of modules_to_save is tied to another")
        found |= dict.fromkeys(tied)
    # A module inside another one that is saved is saved with it.
    return [path for path in modules if path in found and not any(path.startswith(other + ".") for other in found)]


def _tied_to(saved: Collection[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of the modules that share a parameter with a saved one."""
    inside = [path for path in modules if any(path == root or path.startswith(root + ".") for root in saved)]
    held = {id(parameter) for path in inside for parameter in modules[path]._parameters.values()}
    owners = [names for one, names in names_by_parameter(modules.items()).items() if one in held]
    paths = dict.fromkeys(name.rpartition(".")[0] for names in owners for name in names)
    return [path for path in paths if path not in inside]


def _check_saved(root: str, inside: Mapping[str, nn.Module], targets: Collection[str], problems: list[str]) -> None:
    problems += [f"{path}: it is a target, and modules_to_save has {root!r}" for path in inside if path in targets]
    buffers = [
        f"{path}.{name}"
        for path, module in inside.items()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
    if buffers:
        problems.append(f"modules_to_save: {root!r} keeps running values, which no adapter can hold: {buffers[0]}")
    bits = [f"{path} ({module.format})" for path, module in inside.items() if isinstance(module, QuantizedLinear)]
    if bits:
        problems.append(f"modules_to_save: {root!r} holds a quantised weight, which cannot be trained: {bits[0]}")
    elif not any(parameter is not None for module in inside.values() for parameter in module._parameters.values()):
        problems.append(f"modules_to_save: {root!r} has no parameters")


def _biased(modules: Mapping[str, nn.Module], config: LoraConfig, targets: Collection[str]) -> list[str]:
    if config.bias == "none":
        return []
    among = [path for path in modules if path in targets] if config.bias == "lora_only" else list(modules)
    return [path for path in among if modules[path]._parameters.get("bias") is not None]


def _note_tied(modules: Mapping[str, nn.Module], replaced: list[tuple[str, tuple[str, ...]]], notes: list[str]) -> None:
    """A tied weight that is replaced in one place stays the base's in the other."""
    owners = names_by_parameter(modules.items())
    full = {f"{path}.{name}" for path, names in replaced for name in names}
    for tied in owners.values():
        for name in tied:
            others = [other for other in tied if other not in full]
            if name in full and others:
                notes.append(f"{name} is trained whole and parts from {', '.join(others)}, which stays the base's")
