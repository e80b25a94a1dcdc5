"""The handle: one object that owns the adapters of a model and has every verb for them.

Two states: *attached* (any set of adapters active; none active is the base) and *merged* (deltas folded into the
weights). In *merged*, verbs that would change or bypass the merged weights raise `MergedError`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from loratune.adapt.build import Modules, Parts, fresh_parts, saved_parts
from loratune.adapt.entry import Entry, as_value, refuse_waiting, tokenizer_files
from loratune.adapt.fit import check_fit
from loratune.adapt.fold import fold, unfold
from loratune.adapt.heads import with_task
from loratune.adapt.initialise import from_data, real_tokens
from loratune.adapt.inventory import Inventory
from loratune.adapt.mixing import Mixed, check_mixed, expecting, names_of_rows, rows_of
from loratune.adapt.placement import refuse_meta
from loratune.adapt.plan import TargetPlan, plan, plan_as_written
from loratune.adapt.reference import Reference
from loratune.adapt.register import Register, listed
from loratune.adapt.stranger import base_hash, refuse_strangers, say_what_is_odd, with_tokenizer
from loratune.adapter import DTYPES, Origin, SavedAdapter, adapter_folder, card_of, read_adapter, write_adapter
from loratune.config import LoraConfig
from loratune.errors import AdapterStateError, MergedError, Refusals
from loratune.lora import TokenCounter, base_modules
from loratune.quant import known_by

# Where a model keeps its handle: a plain attribute, so that a copy of the model has a copy of it.
ATTRIBUTE = "_loratune"


class Adapters(Inventory):
    """The adapters of one model. Made by `attach`, found again by `adapters(model)`."""

    # -- adding and switching ------------------------------------------------------------------------------------

    def add(self, config: LoraConfig, name: str, *, dtype: torch.dtype | None = None) -> None:
        """One more fresh adapter, trainable, not yet active.

        Raises:
            TargetError: with every problem of the plan; the model is unchanged.
        """
        refusals = Refusals()
        refusals.attempt(lambda: self._refuse_new(name, dtype))
        target_plan = plan(self.model, config)
        refusals.attempt(target_plan.check)
        refusals.check()
        config = with_task(self.model, config)
        modules = dict(base_modules(self.model))
        # The first that no adapter here has: what was added and removed before makes no difference.
        ordinal = self._register.free_ordinal()
        parts = fresh_parts(modules, config, target_plan, ordinal=ordinal, dtype=dtype)
        waits = config.init_lora_weights == "eva"
        entry = Entry(config, target_plan, self._base_name(), ordinal=ordinal, waits=waits)
        self._put(name, entry, parts, modules, trainable=not waits)

    def initialise(
        self, batches: Iterable[Any], name: str | None = None, *,
        forward: Callable[[Any], Any] | None = None, counts: Callable[[Any], Tensor | None] = real_tokens,
    ) -> None:  # fmt: skip
        """Let an adapter with init "eva" start from what its layers are given in these batches, before its first step.

        A becomes the directions in which a layer's inputs vary most, and ranks move to the layers where they explain
        most (arXiv:2410.07170); its config then says which.

        Args:
            batches: what `forward` takes; by default a mapping or sequence of the model's arguments.
            counts: which tokens of a batch count, as bool in their shape; by default those that are there and scored.

        Raises:
            AdapterStateError: another init, after training, or a layer that no batch reaches; nothing is changed.
        """
        self._refuse_merged()
        name = self._one(name)
        with self._only():  # as the base computes
            entry = from_data(self._register.entries[name], name, self._placement, batches, forward, counts)
        self._register.put(name, entry)
        self._require_grad(name, True)

    def load(
        self,
        adapter: str | os.PathLike[str] | SavedAdapter,
        name: str,
        trainable: bool = False,
        *,
        dtype: torch.dtype | None = None,
        tokenizer: Any = None,
        any_base: bool = False,
    ) -> None:
        """One more adapter from a folder, a hub id or a value, frozen unless `trainable`, not yet active.

        Args:
            tokenizer: the one at hand; another than the adapter was saved with is refused.
            any_base: accept a base that is not the one the adapter was trained on, but has its modules and shapes.

        Raises:
            AdapterFileError: missing, extra or misshaped tensors, another base, all listed; the model is unchanged.
        """
        self._refuse_new(name, dtype)
        if isinstance(adapter, SavedAdapter):
            saved, where = adapter, "the adapter"
        else:
            folder = adapter_folder(adapter)
            saved, where = read_adapter(folder), str(folder)
        target_plan = plan_as_written(self.model, saved.config)
        refusals = Refusals()
        refusals.attempt(lambda: target_plan.check(where))
        if not target_plan.problems:
            refusals.attempt(lambda: check_fit(self.model, target_plan, saved, where, any_base=any_base))
        base = None if any_base or saved.origin.base is None else self._base_hash(target_plan)
        refusals.attempt(lambda: refuse_strangers(saved.origin, where, base, tokenizer))
        refusals.check()
        target_plan = replace(target_plan, notes=(*target_plan.notes, *say_what_is_odd(saved, where)))
        modules = dict(base_modules(self.model))
        parts = saved_parts(modules, saved, target_plan, dtype=dtype, trainable=trainable)
        self._put(name, Entry.of(saved, target_plan), parts, modules, trainable=trainable)

    def activate(self, *names: str) -> None:
        """These adapters and no others; their deltas add up. Without names the model is the base.

        Raises:
            AdapterStateError: an unknown name, two adapters that have their own of one tensor, or DoRA on a weight that
                another one has its own of.
        """
        self._refuse_merged()
        if self._state.view.batch is not None:
            raise AdapterStateError("each row has its own adapter inside this rows() block", hint="activate after it")
        self._state.change(active=self._register.together(names))

    def disabled(self) -> AbstractContextManager[None]:
        """The base alone inside the block; what was active before is active again after it."""
        return self._only()

    def reference(self, *names: str) -> Reference:
        """The base, or the model with these adapters, as a module that computes beside what is trained; a copy of none.

        Where a loss compares with what was there before: `DPOTrainer(model, ref_model=lora.reference(), ...)`.
        """
        self._refuse_merged()
        return Reference(self.model, self._register.together(names), self._only)

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside the block each row of the batch has the adapter of its name, or none where it is None.

        Raises:
            AdapterStateError: no list, an unknown name, a model in training mode, adapters that cannot be mixed; and
                from the model, a batch with another number of rows.
        """
        self._refuse_merged()
        names = names_of_rows(names)
        distinct = tuple(dict.fromkeys(names))
        used = self._register.all_known([name for name in distinct if name is not None])
        check_mixed(self.model, self._register.of(used), len(distinct))
        if len(distinct) == 1:
            fields: dict[str, Any] = {"active": used, "rows": None}
        else:
            fields = {"active": (), "rows": rows_of(self._placement, names)}

        with expecting(self.model, self._state), self._state.suspending(used, batch=len(names), **fields):
            yield

    def mixed(self, *names: str) -> Mixed:
        """These adapters, as they are now, for passes in which each token has its own; raises as `rows`."""
        self._refuse_merged()
        used = self._register.all_known(names)
        check_mixed(self.model, self._register.of(used), len(used) + 1, by_token=True)
        return Mixed(self._placement, used)

    def counting(self, counter: TokenCounter) -> AbstractContextManager[None]:
        """Inside the block dropout masks are drawn from `counter` instead of torch's generator."""
        return self._state.counting(counter)

    def bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` with the adapters of now, whenever it runs: for your own `torch.utils.checkpoint.checkpoint`.

        Blocks that `transformers` recomputes see the adapters of their forward pass without it.
        """
        return self._state.bound(function)

    def freeze(self, name: str) -> None:
        self._require_grad(name, False)

    def unfreeze(self, name: str) -> None:
        refuse_waiting(name, self._register.entries[self._register.known(name)])
        self._require_grad(name, True)

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name; refused while merged."""
        self._refuse_merged()
        self._register.known(old)
        self._register.free(new)
        self._placement.rename(old, new)
        self._register.rename(old, new)
        self._state.rename(old, new)

    def remove(self, name: str) -> None:
        """Forget an adapter; refused while active or merged."""
        self._refuse_merged()
        self._register.known(name)
        if name in self._state.used:
            raise AdapterStateError(f"adapter {name!r} is active", hint="activate another one, or none, first")
        self._placement.take(name)
        self._state.forget(name)
        self._register.remove(name)

    # -- files ---------------------------------------------------------------------------------------------------

    def save(
        self, path: str | os.PathLike[str], name: str | None = None, tokenizer: Any = None, *, about: str = ""
    ) -> None:
        """Write one adapter (the only or the only active one without a name) as PEFT files, all or none.

        Args:
            tokenizer: saved beside the adapter, where the adapter was trained with it.
            about: Markdown for the model card.
        """
        saved = self.saved(name)
        if tokenizer is not None:
            saved = replace(saved, origin=with_tokenizer(saved.origin, tokenizer))
        write_adapter(Path(path), saved, card=card_of(saved, about=about), beside=tokenizer_files(tokenizer))

    def saved(self, name: str | None = None) -> SavedAdapter:
        """One adapter as a value that shares the live tensors; its targets are written out by name."""
        name = self._one(name)
        entry = self._register.entries[name]
        # One that was loaded keeps what its file says, so that its files stay what they were.
        base = None if entry.origin else self._gone[name] if name in self._gone else self._base_hash(entry.plan)
        return as_value(self._placement, name, entry, entry.origin or Origin(base=base))

    # -- merging -------------------------------------------------------------------------------------------------

    def merge(self, *, keep_base: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, float]:
        """Fold the active adapters into the weights; those in few bits are quantised again, which a warning tells.

        Args:
            keep_base: hold the original tensors, so that `unmerge` restores their bits (costs their memory again);
                without it nothing is held and the merge cannot be undone.
            dtype: fp32 or fp64; what the deltas are computed and added in before the one rounding.

        Returns:
            Of weights in few bits, by module path: how far each is from W + ΔW, relative to ΔW.

        Raises:
            AdapterStateError: a tied weight would part, or a merged tensor would not be finite; nothing was changed.
        """
        self._refuse_merged()
        if dtype not in (torch.float32, torch.float64):
            raise AdapterStateError(f"a merge in {dtype} would round twice", hint="torch.float32 or torch.float64")
        if self._state.suspended:
            raise AdapterStateError("a merge would outlive this block", hint="merge after disabled() or rows()")
        if not self._state.active:
            raise AdapterStateError("no adapter is active, so there is nothing to merge", hint="activate one first")
        for name in self._state.active:
            refuse_waiting(name, self._register.entries[name])
        active, gone = self._state.active, {}
        if not keep_base:
            gone = {name: self._base_hash(self.plan(name)) for name in self.names}  # while the base is there

        def begin() -> None:
            """From here on the base is changed: where that fails halfway, it is merged and cannot be undone."""
            self._merged, self._gone = active, gone
            self._state.change(active=())

        self._kept, missed = fold(self._placement, active, keep_base=keep_base, dtype=dtype, begin=begin)
        return missed

    def unmerge(self) -> None:
        """The exact weights from before `merge`, and the adapters active again beside them."""
        if not self._merged:
            raise AdapterStateError("nothing is merged", hint="merge first")
        unfold(self._placement, self._kept)
        self._state.change(active=self._merged)
        self._merged, self._kept = (), None

    def detach(self, *, merged: bool = False) -> nn.Module:
        """Take every adapter off; returns the model as it was before `attach`. The handle is of no use afterwards.

        Args:
            merged: leave the merged weights where they are instead.
        """
        if vars(self.model).get(ATTRIBUTE) is not self:
            raise AdapterStateError("this handle is detached already", hint="attach again for a new one")
        if merged and not self._merged:
            raise AdapterStateError("nothing is merged", hint="merge first, or detach without merged=True")
        if self._merged and not merged:
            unfold(self._placement, self._kept)
        self._placement.clear()
        parameters = dict(self.model.named_parameters())
        for name, required in self._required_grad.items():
            if name in parameters:
                parameters[name].requires_grad_(required)
        delattr(self.model, ATTRIBUTE)
        self._register, self._merged, self._kept, self._detached = Register(), (), None, True
        self._state.clear()
        return cast(nn.Module, self.model)

    # -- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _only(self, *names: str) -> Iterator[None]:
        self._refuse_merged()
        active = self._register.together(names)
        with self._state.suspending(active, active=active, rows=None, batch=None):
            yield

    def _put(self, name: str, entry: Entry, parts: Parts, modules: Modules, *, trainable: bool) -> None:
        self._placement.put(name, parts, modules, trainable=trainable)
        if not self.names:
            self._placement.bind()
        self._register.put(name, entry)

    def _require_grad(self, name: str, value: bool) -> None:
        for parameter in self._placement.parameters(self._register.known(name)):
            parameter.requires_grad_(value)

    def _base_hash(self, target_plan: TargetPlan) -> str | None:
        refuse_meta(self.base_parameters())
        return base_hash(known_by(base_modules(self.model)), target_plan, self._kept or {})

    def _base_name(self) -> str | None:
        name = getattr(self.model, "name_or_path", None)
        return str(name) if name else None

    def _refuse_merged(self) -> None:
        if self._detached:
            raise AdapterStateError("this handle is detached from its model", hint="attach again for a new one")
        if self._merged:
            raise MergedError(f"{listed(self._merged)} merged into the weights", hint="unmerge first")

    def _refuse_new(self, name: str, dtype: torch.dtype | None) -> None:
        self._refuse_merged()
        self._register.free(name)
        if dtype is not None and dtype not in DTYPES:
            raise AdapterStateError(f"A and B cannot be {dtype}", hint="torch.float32, torch.bfloat16 or torch.float16")
