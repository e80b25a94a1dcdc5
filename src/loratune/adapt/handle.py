"""The handle: one object that owns the adapters of a model and has every verb for them.

Two states: *attached* (any set of adapters active; none active is the base) and *merged* (deltas folded into the
weights). In *merged*, verbs that would change or bypass the merged weights raise `MergedError`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from loratune.adapt.fit import check_fit
from loratune.adapt.fold import fold, unfold
from loratune.adapt.plan import TargetPlan, plan
from loratune.adapt.summary import summary_of
from loratune.adapt.written import written
from loratune.adapter import SavedAdapter, card_of, read_adapter, write_adapter
from loratune.config import LoraConfig
from loratune.errors import AdapterStateError, MergedError, nearest
from loratune.lora import (
    AdapterState,
    LoraLayer,
    LowRank,
    TokenCounter,
    adapt_in_place,
    adapter_prefixes,
    generator_for,
    initial_factors,
    release,
)

# Where a model keeps its handle: a plain attribute, so that a copy of the model has a copy of it.
ATTRIBUTE = "_loratune"


class Count(NamedTuple):
    """Parameters: those that train, all there are (the base's and every adapter's), and their ratio."""

    trainable: int
    total: int

    @property
    def share(self) -> float:
        return self.trainable / self.total


@dataclass(frozen=True)
class _Entry:
    config: LoraConfig
    plan: TargetPlan
    base: str | None
    revision: str | None = None
    unknown: dict[str, Any] = field(default_factory=dict)


class Adapters:
    """The adapters of one model. Made by `attach`, found again by `adapters(model)`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._state = AdapterState()
        self._entries: dict[str, _Entry] = {}
        self._layers: dict[str, LoraLayer] = {}
        self._merged: tuple[str, ...] = ()
        self._kept: dict[str, Tensor] | None = None
        self._drawn = 0
        self._suspended: list[tuple[str, ...]] = []
        self._required_grad = {name: p.requires_grad for name, p in model.named_parameters()}

    # -- what is there -------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters whose deltas the output holds; while merged, those that are in the weights."""
        return self._merged or self._state.active

    @property
    def merged(self) -> bool:
        return bool(self._merged)

    def config(self, name: str | None = None) -> LoraConfig:
        return self._entries[self._one(name)].config

    def plan(self, name: str | None = None) -> TargetPlan:
        """The target plan an adapter was made by."""
        return self._entries[self._one(name)].plan

    def factors(self, name: str | None = None) -> dict[str, LowRank]:
        """Module path → the adapter's A, B and scale there; the live modules, not copies."""
        name = self._one(name)
        return {path: cast(LowRank, layer.lora[name]) for path, layer in self._layers.items() if name in layer.lora}

    def parameters(self, name: str | None = None) -> list[nn.Parameter]:
        """What trains: of one adapter, or of all."""
        names = self.names if name is None else (self._known(name),)
        return [
            p
            for n in names
            for low_rank in self.factors(n).values()
            for p in (low_rank.A, low_rank.B)
            if p.requires_grad
        ]

    def param_groups(
        self, lr: float, lora_plus_ratio: float | None = None, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Optimizer groups; with LoRA+ (Hayou et al., arXiv:2402.12354) B learns at `lora_plus_ratio` · lr."""
        low_ranks = [low_rank for name in self.names for low_rank in self.factors(name).values()]
        a = [low_rank.A for low_rank in low_ranks if low_rank.A.requires_grad]
        b = [low_rank.B for low_rank in low_ranks if low_rank.B.requires_grad]
        if lora_plus_ratio is None:
            return [{"params": a + b, "lr": lr, "weight_decay": weight_decay}]
        return [
            {"params": a, "lr": lr, "weight_decay": weight_decay},
            {"params": b, "lr": lr * lora_plus_ratio, "weight_decay": weight_decay},
        ]

    def base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The base's own parameters by name: everything that is no adapter's."""
        prefixes = adapter_prefixes(self.model)
        return ((name, p) for name, p in self.model.named_parameters() if not name.startswith(prefixes))

    def base_state(self) -> dict[str, Tensor]:
        """`state_dict` without the adapters' tensors: the base, or the merged model."""
        prefixes = adapter_prefixes(self.model)
        return {name: tensor for name, tensor in self.model.state_dict().items() if not name.startswith(prefixes)}

    def count(self) -> Count:
        parameters = list(self.model.parameters())
        return Count(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))

    def summary(self) -> str:
        """Trainable and total parameters, then one line for each kind of adapted module."""
        return summary_of(self.count(), {name: entry.plan for name, entry in self._entries.items()}, self.active)

    # -- adding and switching ------------------------------------------------------------------------------------

    def add(self, config: LoraConfig, name: str, *, dtype: torch.dtype | None = None) -> None:
        """One more fresh adapter, trainable, not yet active."""
        self._refuse_merged()
        self._free(name)
        _check_dtype(dtype)
        target_plan = plan(self.model, config)
        target_plan.check()
        seed = torch.initial_seed()
        self._drawn += 1
        factors = {}
        for target in target_plan.targets:
            factors[target.path] = initial_factors(
                config.init_lora_weights,
                r=target.r,
                in_features=target.in_features,
                out_features=target.out_features,
                generator=generator_for(seed, self._drawn, target.path),
            )
        self._place(name, _Entry(config, target_plan, self._base_name()), factors, dtype, trainable=True)

    def load(
        self, path: str | os.PathLike[str], name: str, *, trainable: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        """One more adapter from a folder, frozen unless `trainable`, not yet active.

        Raises:
            AdapterFileError: missing, extra or misshaped tensors, all listed; the model is unchanged.
        """
        self._refuse_merged()
        self._free(name)
        _check_dtype(dtype)
        saved = read_adapter(Path(path))
        target_plan = plan(self.model, saved.config)
        target_plan.check()
        check_fit(target_plan, saved, Path(path))
        kept = tuple(f"{path}: the unknown key {key!r} is kept and means nothing here" for key in sorted(saved.unknown))
        target_plan = replace(target_plan, notes=target_plan.notes + kept)
        entry = _Entry(saved.config, target_plan, saved.base, saved.revision, dict(saved.unknown))
        self._place(name, entry, saved.factors, dtype, trainable=trainable)

    def activate(self, *names: str) -> None:
        """These adapters and no others; their deltas add up. Without names the model is the base."""
        self._refuse_merged()
        self._state.active = tuple(dict.fromkeys(self._known(name) for name in names))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base alone inside the block; what was active before is active again after it."""
        self._refuse_merged()
        self._suspended.append(self._state.active)
        self._state.active = ()
        try:
            yield
        finally:
            if self._suspended:  # not so after `detach`
                self._state.active = self._suspended.pop()

    @contextmanager
    def counting(self, counter: TokenCounter) -> Iterator[None]:
        """Inside the block dropout masks are drawn from `counter` instead of torch's generator."""
        before, self._state.counter = self._state.counter, counter
        try:
            yield
        finally:
            self._state.counter = before

    def freeze(self, name: str) -> None:
        self._require_grad(self._known(name), False)

    def unfreeze(self, name: str) -> None:
        self._require_grad(self._known(name), True)

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name; refused while merged."""
        self._refuse_merged()
        self._known(old)
        self._free(new)
        for layer in self._layers.values():
            if old in layer.lora:
                layer.lora[new] = layer.lora.pop(old)
        self._entries = {new if name == old else name: entry for name, entry in self._entries.items()}
        self._state.active = _renamed(self._state.active, old, new)
        self._suspended = [_renamed(names, old, new) for names in self._suspended]

    def remove(self, name: str) -> None:
        """Forget an adapter; refused for an active one."""
        self._refuse_merged()
        if any(self._known(name) in names for names in (self._state.active, *self._suspended)):
            raise AdapterStateError(f"adapter {name!r} is active", hint="activate another one, or none, first")
        for path, layer in list(self._layers.items()):
            if name in layer.lora:
                del layer.lora[name]
            if not layer.lora:
                release(self._layers.pop(path))
        del self._entries[name]

    # -- files ---------------------------------------------------------------------------------------------------

    def save(
        self, path: str | os.PathLike[str], name: str | None = None, *, tokenizer: Any = None, about: str = ""
    ) -> None:
        """Write one adapter (the only or the only active one without a name) as PEFT files, all or none.

        Args:
            tokenizer: saved beside the adapter, where the adapter was trained with it.
            about: Markdown for the model card.
        """
        saved = self.saved(name)
        write_adapter(Path(path), saved, card=card_of(saved, about=about), beside=_tokenizer_files(tokenizer))

    def saved(self, name: str | None = None) -> SavedAdapter:
        """One adapter as a value that shares the live tensors; its targets are written out by name."""
        name = self._one(name)
        entry = self._entries[name]
        factors = {path: (low_rank.A.detach(), low_rank.B.detach()) for path, low_rank in self.factors(name).items()}
        return SavedAdapter(
            written(self.model, entry.config, entry.plan), factors, entry.base, entry.revision, entry.unknown
        )

    # -- merging -------------------------------------------------------------------------------------------------

    def merge(self, *, keep_base: bool = True, dtype: torch.dtype = torch.float32) -> None:
        """Fold the active adapters into the weights.

        Args:
            keep_base: hold the original tensors, so that `unmerge` restores their bits (costs their memory again);
                without it nothing is held and the merge cannot be undone.
            dtype: fp32 or fp64; what the deltas are computed and added in before the one rounding.
        """
        self._refuse_merged()
        if dtype not in (torch.float32, torch.float64):
            raise AdapterStateError(f"a merge in {dtype} would round twice", hint="torch.float32 or torch.float64")
        if not self._state.active:
            raise AdapterStateError("no adapter is active, so there is nothing to merge", hint="activate one first")
        if self._suspended:
            raise AdapterStateError("a merge would outlive this disabled() block", hint="merge after the block")
        self._kept = fold(self.model, self._layers, self._state.active, keep_base=keep_base, dtype=dtype)
        self._merged, self._state.active = self._state.active, ()

    def unmerge(self) -> None:
        """The exact weights from before `merge`, and the adapters active again beside them."""
        if not self._merged:
            raise AdapterStateError("nothing is merged")
        unfold(self._layers, self._kept)
        self._state.active, self._merged, self._kept = self._merged, (), None

    def detach(self) -> nn.Module:
        """Take every adapter off; returns the model as it was before `attach`. The handle is of no use afterwards."""
        if vars(self.model).get(ATTRIBUTE) is not self:
            raise AdapterStateError("this handle is detached already", hint="attach again for a new one")
        if self._merged:
            unfold(self._layers, self._kept)
        for layer in self._layers.values():
            release(layer)
        parameters = dict(self.model.named_parameters())
        for name, required in self._required_grad.items():
            if name in parameters:
                parameters[name].requires_grad_(required)
        delattr(self.model, ATTRIBUTE)
        self._layers, self._entries, self._suspended, self._merged, self._kept = {}, {}, [], (), None
        self._state.active = ()
        model: nn.Module = self.model
        return model

    # -- inside --------------------------------------------------------------------------------------------------

    def _place(
        self,
        name: str,
        entry: _Entry,
        factors: Any,
        dtype: torch.dtype | None,
        *,
        trainable: bool,
    ) -> None:
        for target in entry.plan.targets:
            module = self.model.get_submodule(target.path)
            layer = self._layers.get(target.path) or adapt_in_place(module, self._state, target.path)
            self._layers[target.path] = layer
            A, B = (t.to(layer.weight.device, dtype or t.dtype) for t in factors[target.path])
            low_rank = LowRank(A, B, scale=target.scale, dropout=entry.config.lora_dropout)
            low_rank.train(layer.training).requires_grad_(trainable)
            layer.lora[name] = low_rank
        self._entries[name] = entry

    def _require_grad(self, name: str, value: bool) -> None:
        for low_rank in self.factors(name).values():
            low_rank.requires_grad_(value)

    def _base_name(self) -> str | None:
        name = getattr(self.model, "name_or_path", None)
        return str(name) if name else None

    def _refuse_merged(self) -> None:
        if self._merged:
            raise MergedError(f"{_list(self._merged)} merged into the weights", hint="unmerge first")

    def _known(self, name: str) -> str:
        if name not in self._entries:
            raise AdapterStateError(
                f"no adapter {name!r}{nearest(name, self.names)}", hint=f"adapters here: {', '.join(self.names)}"
            )
        return name

    def _one(self, name: str | None) -> str:
        if name is not None:
            return self._known(name)
        for candidates in (self.names, self.active):
            if len(candidates) == 1:
                return candidates[0]
        if not self.names:
            raise AdapterStateError("this model has no adapter left", hint="add or load one")
        raise AdapterStateError("which adapter? there are several", hint=f"name one of {', '.join(self.names)}")

    def _free(self, name: str) -> None:
        if name in self._entries:
            raise AdapterStateError(f"an adapter {name!r} is there already", hint="choose another name or remove it")
        if not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise AdapterStateError(f"{name!r} cannot name an adapter", hint="use letters, digits, '-' and '_'")


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and not dtype.is_floating_point:
        raise AdapterStateError(f"A and B cannot be {dtype}", hint="torch.float32, torch.bfloat16 or torch.float16")


def _renamed(names: Sequence[str], old: str, new: str) -> tuple[str, ...]:
    return tuple(new if name == old else name for name in names)


def _tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def _list(names: Sequence[str]) -> str:
    return f"adapter {names[0]!r} is" if len(names) == 1 else f"adapters {', '.join(map(repr, names))} are"
