"""Layers that bitsandbytes quantised, in a model that somebody else loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from loratune.errors import AdapterStateError
from loratune.quant.form import PRODUCT, Form

_HINT = "load the base with loratune's own quant setting, or merge into it as it was before"


@dataclass(frozen=True, slots=True)
class ForeignWeight:
    """The weight of a `Linear4bit` or `Linear8bitLt`; it is read, and the module's own forward multiplies by it."""

    module: Any

    @property
    def kind(self) -> str:
        return type(self.module).__name__

    @property
    def form(self) -> Form:
        return PRODUCT

    @property
    def in_features(self) -> int:
        return int(self.module.in_features)

    @property
    def out_features(self) -> int:
        return int(self.module.out_features)

    @property
    def device(self) -> torch.device:
        return cast(Tensor, self._weight).device

    @property
    def dtype(self) -> torch.dtype:
        if hasattr(self._weight, "quant_state"):
            return cast(torch.dtype, self._weight.quant_state.dtype)
        return torch.bfloat16 if self.device.type == "cpu" else torch.float16

    @property
    def version(self) -> int:
        return cast(Tensor, self._weight)._version

    @property
    def lasting(self) -> bool:
        return False

    @property
    def requires_grad(self) -> bool:
        return cast(Tensor, self._weight).requires_grad

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        decoded = self._four_bits() if hasattr(self._weight, "quant_state") else self._eight_bits()
        return decoded if dtype is None else decoded.to(dtype)

    def lent(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.dense(dtype)

    def computed_by(self, forward: Callable[..., Any]) -> bool:
        return forward.__module__ == "bitsandbytes.nn.modules"

    def plus(self, delta: Tensor) -> Mapping[str, Tensor]:
        raise AdapterStateError(f"nothing is merged into a {self.kind}: {tuple(delta.shape)}", hint=_HINT)

    @property
    def _weight(self) -> Any:
        return self.module._parameters["weight"]

    def _four_bits(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        state = self._weight.quant_state
        # On the CPU the decoder expects blocks to end with rows: each block is a row of its own.
        found: Tensor = dequantize_4bit(self._weight.data, _in_blocks(state))
        return found.reshape(-1)[: self.in_features * self.out_features].view(self.out_features, self.in_features)

    def _eight_bits(self) -> Tensor:
        state = self.module.state
        codes = self._weight.data if state.CB is None else state.CB
        largest = self._weight.SCB if state.SCB is None else state.SCB
        decoded: Tensor = codes * (largest.float() / 127)[:, None]
        return decoded.to(self.dtype)


def _in_blocks(state: Any) -> Any:
    from copy import copy

    one = copy(state)
    one.shape = torch.Size((-(-state.shape.numel() // state.blocksize), state.blocksize))
    return one


def why_unreadable(module: nn.Module) -> str | None:
    """Why the values of a layer of bitsandbytes are not what they were, or None."""
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has packed it anew for evaluation, which rounds it: load it again, attach before using it"
    return None


def keep_readable(module: nn.Module) -> None:
    """Keep bitsandbytes from packing the weight anew in place: its next evaluation pass on the CPU would."""
    if hasattr(module, "support_avx512bf16_for_cpu"):
        vars(module)["support_avx512bf16_for_cpu"] = False


def foreign_weight(module: nn.Module) -> ForeignWeight | None:
    """Of a layer of bitsandbytes that holds quantised values; recognised by its name, so that nothing is imported."""
    kinds = {kind.__name__ for kind in type(module).__mro__ if kind.__module__ == "bitsandbytes.nn.modules"}
    weight: Any = module._parameters.get("weight")
    if weight is None or weight.is_floating_point():
        return None
    if "Linear4bit" in kinds and getattr(weight, "quant_state", None) is not None:
        return ForeignWeight(module)
    return ForeignWeight(module) if "Linear8bitLt" in kinds else None
