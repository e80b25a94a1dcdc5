"""Small models around one layer of each kind that can be adapted, and what the slow reference makes of that layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from loratune.lora import LowRank
from tests.oracle import columns
from tests.oracle import lora_reference as oracle


class Mine(nn.Module):
    """A linear layer of somebody's own, which says so by `in_features` and `out_features`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


@dataclass(frozen=True)
class Kind:
    """A layer, an input for it, and of it the columns that its matrix is multiplied by.

    Attributes:
        r: of its adapters. merges: whether they can be.
    """

    make: Callable[[], nn.Module]
    input: Callable[[], Tensor]
    r: int = 2
    merges: bool = True
    biased: bool = True
    stretches: bool = True

    @property
    def is_lookup(self) -> bool:
        return isinstance(self.make(), nn.Embedding)


def _ids() -> Tensor:
    return torch.tensor([[1, 6, 0], [2, 2, 5]])


def _points(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(1))


KINDS: dict[str, Kind] = {
    "Linear": Kind(lambda: nn.Linear(5, 4), _points(2, 3, 5)),
    "Conv1D": Kind(lambda: Conv1D(4, 5), _points(2, 3, 5)),
    "Mine": Kind(lambda: Mine(5, 4), _points(2, 3, 5)),
    "Embedding": Kind(lambda: nn.Embedding(7, 4), _ids, biased=False),
    "padded": Kind(lambda: nn.Embedding(7, 4, padding_idx=2), _ids, biased=False),
    "by frequency": Kind(lambda: nn.Embedding(7, 4, scale_grad_by_freq=True), _ids, biased=False),
    "scaled": Kind(lambda: Gemma3TextScaledWordEmbedding(7, 4, 0, embed_scale=3.0), _ids, biased=False),
    "Conv1d": Kind(lambda: nn.Conv1d(3, 4, 3, padding=1), _points(2, 3, 8)),
    "Conv2d": Kind(lambda: nn.Conv2d(3, 4, (3, 2), stride=2, padding=(2, 1)), _points(2, 3, 5, 6)),
    "a point": Kind(lambda: nn.Conv2d(3, 4, 1, bias=False), _points(2, 3, 4, 4), biased=False),
    "dilated": Kind(lambda: nn.Conv2d(3, 4, 2, dilation=2, padding=1), _points(2, 3, 5, 6)),
    "circular": Kind(lambda: nn.Conv1d(3, 4, 3, padding=2, padding_mode="circular"), _points(2, 3, 8)),
    "reflected": Kind(lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), _points(2, 2, 4, 4)),
    "Conv3d": Kind(lambda: nn.Conv3d(2, 3, (2, 1, 2), padding=(0, 1, 1)), _points(2, 2, 3, 3, 3)),
    "groups": Kind(
        lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), _points(2, 4, 4, 4), r=4, merges=False, stretches=False
    ),
    "by channel": Kind(
        lambda: nn.Conv1d(4, 4, 3, padding=2, groups=4), _points(2, 4, 6), r=4, merges=False, stretches=False
    ),
}


class Around(nn.Module):
    """One layer, and a head that makes its output matter."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.layer = kind.make()
        self.head = nn.Linear(self.layer(kind.input()).flatten(1).shape[1], 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(torch.tanh(self.layer(x)).flatten(1)))


def around(kind: Kind, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Around, Tensor]:
    """The model, and an input for it."""
    torch.manual_seed(seed)
    model = Around(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    x = kind.input()
    return model.to(dtype), x.to(dtype) if x.is_floating_point() else x


def columns_of(layer: Any, x: Tensor) -> oracle.Array:
    """(positions, columns): what the layer's matrix is multiplied by."""
    if isinstance(layer, nn.Embedding):
        return columns.one_hot(x.flatten().tolist(), layer.num_embeddings)
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return oracle.exact(x).reshape(-1, x.shape[-1])
    assert isinstance(layer.padding, tuple)
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode)
    return np.concatenate([columns.patches(oracle.exact(image), *shape) for image in x])


def matrix_of(layer: Any) -> oracle.Array:
    """(out, columns), over all inputs."""
    weight = oracle.exact(layer._parameters["weight"])
    if isinstance(layer, nn.Embedding):
        return weight.T * factor_of(layer)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return columns.whole(weight, layer.groups)
    return weight.T if isinstance(layer, Conv1D) else weight


def factor_of(layer: Any) -> float:
    return 3.0 if isinstance(layer, Gemma3TextScaledWordEmbedding) else 1.0


def update_of(layer: Any, low_rank: LowRank) -> oracle.Update:
    A, B = oracle.exact(low_rank.A), oracle.exact(low_rank.B)
    return oracle.Update(
        A.reshape(len(A), -1),
        columns.blocks(B, getattr(layer, "groups", 1)) if B.ndim > 2 else B,
        low_rank.scale * factor_of(layer),
        None,
        None if low_rank.bias is None else oracle.exact(low_rank.bias),
        None if low_rank.magnitude is None else oracle.exact(low_rank.magnitude) * factor_of(layer),
    )


def by_position(layer: Any, y: Tensor) -> oracle.Array:
    """A layer's output as (positions, out)."""
    found = oracle.exact(y)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        found = np.moveaxis(found, 1, -1)
    return found.reshape(-1, found.shape[-1])
