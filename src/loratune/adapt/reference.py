"""What a preference loss compares the trained model with: that model without its adapter, as a module of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from loratune.lora import adapter_prefixes, base_parameters


class Reference(nn.Module):
    """Computes what the model does with some of its adapters, or with none, whatever is active and trained meanwhile.

    In evaluation mode and without gradients, as a frozen copy would; but it holds nothing itself, so that moving it
    or setting its mode changes nothing, and `parameters()` and `state_dict()` are those of the model.

    Attributes:
        names: the adapters; none for the base.
    """

    def __init__(
        self, model: nn.Module, names: tuple[str, ...], only: Callable[..., AbstractContextManager[None]]
    ) -> None:
        super().__init__()
        self.names = names
        # In a tuple, so that it is nobody's child.
        self._model = (model,)
        self._only = only

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Around `forward`, in whose place TRL puts one of its own, which calls the parts below.
        # Not imported above: a model of plain torch needs no transformers until somebody compares with it.
        from loratune.model.modes import evaluating

        (model,) = self._model
        with torch.no_grad(), evaluating(model), self._only(*self.names):
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._model[0](*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The base's."""
        del args, kwargs
        return base_parameters(self._model[0])

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The base's tensors and those of the adapters that count here."""
        state: dict[str, Tensor] = self._model[0].state_dict(*args, **kwargs)
        prefixes = adapter_prefixes(self._model[0])
        own = tuple(f"{prefix}{name}." for prefix in prefixes for name in self.names)
        return {key: tensor for key, tensor in state.items() if not key.startswith(prefixes) or key.startswith(own)}

    # -- what trainers ask of a language model ---------------------------------------------------------------------

    @property
    def config(self) -> Any:
        return self._model[0].config

    @property
    def base_model(self) -> Any:
        """The trunk; it computes as a reference only inside a call of this module."""
        return self._model[0].base_model

    def get_output_embeddings(self) -> Any:
        find: Any = self._model[0].get_output_embeddings
        return find()
