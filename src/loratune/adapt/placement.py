"""Where adapters stand on a model: the modules they are put on, and taken off from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from torch import Tensor, nn

from loratune.adapt.build import Modules, Parts
from loratune.adapt.forms import LAYERS
from loratune.adapter.keys import TOKEN_ROWS
from loratune.errors import AdapterStateError
from loratune.lora import (
    AdapterState,
    LoraLayer,
    OwnRows,
    Recomputed,
    StackedLowRank,
    Tensors,
    Term,
    adapt_in_place,
    adapt_parameter,
    base_modules,
    bind_recomputation,
    can_be_recomputed,
    covered,
    end_retraining,
    give_back,
    release,
    release_parameters,
    replace_in,
    retrain_in,
    unbind_recomputation,
)
from loratune.quant import FrozenWeight, adaptable, keep_readable


class Placement:
    """The adapted modules of one model.

    Attributes:
        layers: module path → layer with low-rank terms, by adapter in its `lora`.
        replacing: module path → module of which some adapter has its own tensors.
        retraining: module path → module of whose table some adapter has rows of its own.
        stacking: module path → module with parameters that some adapter has low-rank terms on.
    """

    def __init__(self, model: nn.Module, state: AdapterState) -> None:
        self.model = model
        self.state = state
        self.layers: dict[str, LoraLayer] = {}
        self.replacing: dict[str, nn.Module] = {}
        self.retraining: dict[str, nn.Module] = {}
        self.stacking: dict[str, nn.Module] = {}

    def bind(self) -> None:
        """Let blocks that are recomputed in the backward pass see the adapters of their forward pass."""
        for _, module in list(base_modules(self.model)):
            if can_be_recomputed(module):
                bind_recomputation(module, self.state)

    def put(self, name: str, parts: Parts, modules: Modules, *, trainable: bool) -> None:
        """Put one adapter on its modules.

        Raises:
            AdapterStateError: as `take`; nothing is changed.
        """
        stacked = {full.rpartition(".")[0] for full in parts.stacks}
        changed = (parts.low_ranks.keys() - self.layers) | parts.replaced.keys() | parts.rows.keys() | stacked
        _refuse_covered({path: modules[path] for path in changed})
        for path, low_rank in parts.low_ranks.items():
            layer = self.layers.get(path)
            if layer is None:
                keep_readable(modules[path])
                kind = LAYERS[weight_of(modules[path]).form.use]
                layer = adapt_in_place(modules[path], self.state, path, weight_of, kind)
                self.layers[path] = layer
            low_rank.training = layer.training
            layer.lora[name] = low_rank if trainable else low_rank.requires_grad_(False)
        for path, tensors in parts.replaced.items():
            module = modules[path]
            replace_in(module, self.state, name, tensors).train(module.training).requires_grad_(trainable)
            self.replacing[path] = module
        for path, own in parts.rows.items():
            module = modules[path]
            retrain_in(module, self.state, name, own.requires_grad_(trainable))
            self.retraining[path] = module
        for full, stack in parts.stacks.items():
            path, _, parameter = full.rpartition(".")
            adapt_parameter(modules[path], self.state, name, parameter, stack.requires_grad_(trainable))
            self.stacking[path] = modules[path]

    def take(self, name: str) -> None:
        """Take one adapter off.

        Raises:
            AdapterStateError: a class that somebody put over an adapted module's would be lost; nothing is changed.
        """
        _refuse_covered(dict(base_modules(self.model)))
        for path, layer in list(self.layers.items()):
            if name in layer.lora:
                del layer.lora[name]
            if not layer.lora:
                release(self.layers.pop(path))
        for path, module in list(self.replacing.items()):
            if name in _holder(module):
                give_back(module, name)
            if not hasattr(module, "lora_replaced"):
                del self.replacing[path]
        for path, module in list(self.retraining.items()):
            if name in _rows(module):
                end_retraining(module, name)
            if not hasattr(module, "lora_rows"):
                del self.retraining[path]
        self._take_stacks(name)

    def _take_stacks(self, name: str) -> None:
        for path, module in list(self.stacking.items()):
            if name in _terms(module):
                release_parameters(module, name)
            if not hasattr(module, "lora_parameters"):
                del self.stacking[path]

    def rename(self, old: str, new: str) -> None:
        replaced, rows = map(_holder, self.replacing.values()), map(_rows, self.retraining.values())
        stacked = map(_terms, self.stacking.values())
        for holder in (*(layer.lora for layer in self.layers.values()), *replaced, *rows, *stacked):
            if old in holder:
                holder[new] = holder.pop(old)

    def clear(self) -> None:
        """Take everything off: every module has its own class and tensors again; raises as `take`."""
        _refuse_covered(dict(base_modules(self.model)))
        for layer in self.layers.values():
            release(layer)
        for module in self.replacing.values():
            for name in list(_holder(module)):
                give_back(module, name)
        for module in self.retraining.values():
            for name in list(_rows(module)):
                end_retraining(module, name)
        for module in self.stacking.values():
            for name in list(_terms(module)):
                release_parameters(module, name)
        for _, module in list(base_modules(self.model)):
            if isinstance(module, Recomputed):
                unbind_recomputation(module)
        self.layers, self.replacing, self.retraining, self.stacking = {}, {}, {}, {}

    def terms(self, name: str) -> dict[str, Term]:
        """What one adapter adds to layers by module path, and to parameters by their full name."""
        found = {path: cast(Term, layer.lora[name]) for path, layer in self.layers.items() if name in layer.lora}
        return found | self.stacks(name)

    def stacks(self, name: str) -> dict[str, StackedLowRank]:
        """One adapter's low-rank terms on parameters by their full name."""
        return {
            f"{path}.{parameter}": cast(StackedLowRank, stack)
            for path, module in self.stacking.items()
            if name in _terms(module)
            for parameter, stack in cast(nn.ModuleDict, _terms(module)[name]).items()
        }

    def own_rows(self, name: str) -> dict[str, OwnRows]:
        """One adapter's rows by the path of their table; modules that share it come with the same ones."""
        return {
            path: cast(OwnRows, _rows(module)[name])
            for path, module in self.retraining.items()
            if name in _rows(module)
        }

    def replaced(self, name: str) -> dict[str, nn.Parameter]:
        """One adapter's own tensors by the full name of the base's, and its rows by their table's, once."""
        once: dict[nn.Parameter, str] = {}
        for path, own in self.own_rows(name).items():
            once.setdefault(own.rows, f"{path}.{TOKEN_ROWS}")
        return self.replaced_whole(name) | {full: rows for rows, full in once.items()}

    def replaced_whole(self, name: str) -> dict[str, nn.Parameter]:
        """One adapter's own tensors by the full name of the base's."""
        return {
            f"{path}.{own}": parameter
            for path, module in self.replacing.items()
            if name in _holder(module)
            for own, parameter in cast(Tensors, _holder(module)[name]).named_parameters()
        }

    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        for term in self.terms(name).values():
            yield from term.parameters()
        yield from dict.fromkeys(self.replaced(name).values())  # tied ones once

    def gone(self, names: Sequence[str]) -> dict[str, str]:
        """What of these adapters stands on modules or shapes that the model has no more, and why.

        `resize_token_embeddings`, say, puts other modules in place, or other weights into them.
        """
        layers = {path: layer for path, layer in self.layers.items() if any(name in layer.lora for name in names)}
        replacing = {p: m for p, m in self.replacing.items() if any(name in _holder(m) for name in names)}
        retraining = {p: m for p, m in self.retraining.items() if any(name in _rows(m) for name in names)}
        stacking = {p: m for p, m in self.stacking.items() if any(name in _terms(m) for name in names)}
        now = dict(base_modules(self.model))
        found = {
            path: "the module has been replaced by another one since it was adapted"
            for path, module in (layers | replacing | retraining | stacking).items()
            if now.get(path) is not module
        }
        for path in layers.keys() - found.keys():
            if adaptable(layers[path]) is None:
                found[f"{path}.weight"] = "it is no plain parameter any more"
        for full, own in [item for name in names for item in self.replaced_whole(name).items()]:
            path, _, tensor = full.rpartition(".")
            base = self.replacing[path]._parameters.get(tensor)
            if path not in found and (base is None or base.shape != own.shape):
                there = "gone" if base is None else tuple(base.shape)
                found[full] = f"the adapter's own is {tuple(own.shape)}, the base's {there}"
        tables = {path: own for name in names for path, own in self.own_rows(name).items()}
        for path in tables.keys() - found.keys():
            table = retraining[path]._parameters.get("weight")
            if table is None or len(table) <= int(tables[path].numbers[-1]):
                found[f"{path}.weight"] = "its table has no such rows any more"
        for full, stack in [item for name in names for item in self.stacks(name).items()]:
            path, _, parameter = full.rpartition(".")
            if path not in found and not stack.fits(stacking[path]._parameters.get(parameter)):
                found[full] = "it has another shape than when it was adapted"
        return found

    def base_tensor(self, full_name: str) -> Tensor:
        """The base's own tensor of that name, or its table of those rows, whatever stands in its place now.

        A quantised one is a buffer.
        """
        if full_name.endswith(f".{TOKEN_ROWS}"):
            full_name = f"{full_name.removesuffix(TOKEN_ROWS)}weight"
        path, _, name = full_name.rpartition(".")
        module = self.model.get_submodule(path)
        found = module._parameters.get(name)
        return cast(Tensor, module._buffers[name] if found is None else found)


def _refuse_covered(modules: Modules) -> None:
    found = [path for path, module in modules.items() if covered(module)]
    if found:
        raise AdapterStateError(
            f"{found[0]} and {len(found) - 1} more modules have been given another class since they were adapted "
            f"({type(modules[found[0]]).__name__})",
            hint="change adapters before the model is sharded or wrapped in place",
        )


def refuse_meta(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise unless the tensors hold values: on the meta device they have a shape alone."""
    bare = [name for name, tensor in tensors if tensor.is_meta]
    if bare:
        more = f" and {len(bare) - 1} more" if len(bare) > 1 else ""
        raise AdapterStateError(
            f"no values are there, only shapes: {bare[0]}{more} on the meta device",
            hint="load the model with its weights, or fill what is still on the meta device, first",
        )


def weight_of(layer: nn.Module) -> FrozenWeight:
    """The frozen weight of an adapted layer."""
    return cast(FrozenWeight, adaptable(layer))


def _rows(module: nn.Module) -> nn.ModuleDict:
    return cast(nn.ModuleDict, module.lora_rows)


def _terms(module: nn.Module) -> nn.ModuleDict:
    return cast(nn.ModuleDict, module.lora_parameters)


def _holder(module: nn.Module) -> nn.ModuleDict:
    return cast(nn.ModuleDict, module.lora_replaced)
