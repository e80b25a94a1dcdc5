"""`LoraModel`: what `PeftModel.base_model` is, with the verbs that PEFT keeps there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn

from loratune.adapt import Adapters, adapters
from loratune.adapter import combine
from loratune.compat.peft.config import LoraConfig, PeftType, PeftWarning, of_plain
from loratune.errors import ConfigError, nearest

# The name of a row that no adapter serves.
BASE = "__base__"

# PEFT's rules for summing updates; those ending in "_svd" it applies to updates, the others to factors. Here all act
# on the updates, as in the papers.
_METHODS = {
    "cat": "concat",
    "svd": "svd",
    "ties": "ties",
    "ties_svd": "ties",
    "dare_linear": "dare",
    "dare_linear_svd": "dare",
}


class LoraModel(nn.Module):
    """The user's model with adapters; `model` is the model itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        # What is active again when disabled adapters are enabled, and what was before a merge named others.
        self._resting: list[tuple[str, ...]] = []
        self._disabling = ExitStack()
        self._before_merge: tuple[str, ...] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet
                raise
            return getattr(self.model, name)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_disabling"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_resting": []})  # type: ignore[no-untyped-call]
        self._disabling = ExitStack()
        if state["_resting"]:
            # What disabled the original does not end for its copy, which is enabled by a call of its own.
            self.handle.activate(*state["_resting"][0])
            self.disable_adapter_layers()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @property
    def handle(self) -> Adapters:
        """loratune's own object, which has every verb."""
        return adapters(self.model)

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """The config of each adapter by its name; a copy."""
        base = getattr(self.model, "name_or_path", None) or None
        return {
            name: of_plain(
                self.handle.config(name),
                base_model_name_or_path=base,
                inference_mode=not self.handle.parameters(name),
            )
            for name in self.handle.names
        }

    # -- which adapters ------------------------------------------------------------------------------------------

    @property
    def adapters_disabled(self) -> bool:
        return bool(self._resting)

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters; while disabled, those that will be again."""
        return list(self._resting[0] if self._resting else self.handle.active)

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate these adapters and no others; they train unless `inference_mode`, the others are frozen."""
        names = _list(adapter_name)
        self.handle.activate(*names)
        for name in self.handle.names:
            if name in names and not inference_mode:
                self.handle.unfreeze(name)
            else:
                self.handle.freeze(name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in _list(adapter_names):
            if requires_grad:
                self.handle.unfreeze(name)
            else:
                self.handle.freeze(name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; where it was the only active one, the first of the others becomes active."""
        handle = self.handle
        if adapter_name in handle.active:
            rest = [name for name in handle.active if name != adapter_name]
            others = sorted(name for name in handle.names if name != adapter_name)
            if not rest and others:
                warnings.warn(
                    f"adapter {adapter_name!r} was active and is deleted; {others[0]!r} is active now",
                    PeftWarning,
                    stacklevel=2,
                )
            self.set_adapter(rest or others[:1])
        handle.remove(adapter_name)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        active = self.handle.active
        with self.handle.disabled():
            self._resting.append(active)
            try:
                yield
            finally:
                self._resting.pop()

    def disable_adapter_layers(self) -> None:
        if not self._resting:
            self._disabling.enter_context(self.disabled())

    def enable_adapter_layers(self) -> None:
        self._disabling.close()

    @contextmanager
    def rows(self, names: Sequence[str], repeats: int = 1) -> Iterator[None]:
        """Each row of the batch with the adapter it names, `repeats` rows for a name."""
        with self.handle.rows([None if name == BASE else name for name in names for _ in range(repeats)]):
            yield

    # -- merging -------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the weights: the named ones, or the active. Always as safe as `safe_merge`."""
        del safe_merge
        self._fold(adapter_names, keep_base=True)

    def unmerge_adapter(self) -> None:
        self.handle.unmerge()
        if self._before_merge is not None:
            self.handle.activate(*self._before_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The user's model with the adapters in its weights and no longer beside them."""
        del progressbar, safe_merge
        self._fold(adapter_names, keep_base=False)
        return self.handle.detach(merged=True)

    def unload(self) -> nn.Module:
        """The user's model as it was."""
        return self.handle.detach()

    def _fold(self, names: list[str] | None, *, keep_base: bool) -> None:
        handle = self.handle
        active = handle.active
        self._before_merge = None
        if names is not None:
            handle.activate(*names)
        try:
            handle.merge(keep_base=keep_base)
        except Exception:
            if names is not None:
                handle.activate(*active)
            raise
        self._before_merge = active

    # -- combining -----------------------------------------------------------------------------------------------

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """One more adapter, frozen and not active: the weighted sum of others' updates.

        Raises:
            ConfigError: the combination is of factors rather than updates, or not offered.
        """
        del svd_full_matrices, svd_driver  # how an SVD is computed, not what it gives
        method = "concat" if len(adapters) == 1 else _METHODS.get(combination_type)
        problems = [] if method else [_why_not(combination_type)]
        if svd_clamp is not None:
            problems.append(f"svd_clamp={svd_clamp!r}: clamped factors are not the nearest ones, so it is not offered")
        if majority_sign_method != "total":
            problems.append(f"majority_sign_method={majority_sign_method!r}: only 'total', the paper's, is offered")
        if problems:
            raise ConfigError(problems, hint="'cat' is the exact weighted sum, 'svd' the best one of a given rank")
        combined = combine(
            [self.handle.saved(name) for name in adapters],
            weights,
            method=cast(str, method),
            rank=None if method == "concat" else svd_rank,
            density=density if method in ("ties", "dare") else None,
            names=adapters,
        )
        self.handle.load(combined.adapter, adapter_name)


def _why_not(combination_type: str) -> str:
    if combination_type == "linear":
        why = "it adds up A and B apart, and the product of the sums is not a weighted sum of the updates"
        return f"combination_type='linear' is not offered: {why}"
    return f"combination_type={combination_type!r} is not offered{nearest(combination_type, tuple(_METHODS))}"


def _list(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def dtype_for(model: nn.Module, *, autocast_adapter_dtype: bool) -> torch.dtype:
    """Of A and B: fp32, or without PEFT's autocast the base's own."""
    if autocast_adapter_dtype:
        return torch.float32
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


# One model with adapters, of whatever method they are.
PEFT_TYPE_TO_TUNER_MAPPING = dict.fromkeys(PeftType, LoraModel)
