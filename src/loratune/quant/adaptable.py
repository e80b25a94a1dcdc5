"""Every kind of layer that can be adapted by name, and why others cannot.

`frozen_weight` knows those that are linear layers to everybody. Here are also the tables that rows are taken from,
convolutions, and classes of somebody else's that say what they are by `in_features` and `out_features`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from loratune.quant.frozen import frozen_weight
from loratune.quant.weight import DenseWeight, FrozenWeight

_CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def adaptable(module: nn.Module) -> FrozenWeight | None:
    """The module's weight, or None where it has none that an update could be added to."""
    found = frozen_weight(module)
    if found is not None:
        return found
    weight = module._parameters.get("weight")
    if not isinstance(weight, nn.Parameter) or not torch.is_floating_point(weight):
        return None
    if isinstance(module, nn.Embedding) and weight.ndim == 2:
        return DenseWeight("Embedding", weight, transposed=True, use="lookup")
    convolution = _among(module, _CONVOLUTIONS)
    if convolution is not None and weight.ndim == 2 + len(module.kernel_size):  # type: ignore[arg-type]
        own: Any = module
        return DenseWeight(
            convolution.__name__, weight, False, "convolution", tuple(own.kernel_size), own.groups
        )  # fmt: skip
    if (getattr(module, "out_features", None), getattr(module, "in_features", None)) == tuple(weight.shape):
        return DenseWeight(type(module).__name__, weight, transposed=False)
    return None


def why_not_adaptable(module: nn.Module, kind: Any) -> str:
    """What stands against an update of the module's weight, whose own class is `kind`; empty where nothing does."""
    if isinstance(module, nn.MultiheadAttention):
        return (
            "a MultiheadAttention multiplies by its weights itself, past what is added to a module: name linear layers "
            "beside it, or take an attention whose projections are modules that it calls"
        )
    weight = adaptable(module)
    if weight is None:
        return f"a {kind.__name__} cannot be adapted"
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return f"an Embedding with max_norm={module.max_norm:g} changes its own rows whenever it looks them up"
        followed = kind.forward is nn.Embedding.forward or _multiplies_rows(kind)
        return "" if followed else f"{kind.__name__} does more than look rows up, which an update would not follow"
    convolution = _among(module, _CONVOLUTIONS)
    if convolution is not None:
        followed = kind.forward is convolution.forward and kind._conv_forward is convolution._conv_forward
        return "" if followed else f"{kind.__name__} does more than convolve, which an update would not follow"
    if frozen_weight(module) is None and not _computes_product(module, kind, weight):
        return f"{kind.__name__} does not compute W x + b, as its in_features and out_features say"
    return ""


def _among(module: nn.Module, kinds: tuple[Any, ...]) -> Any:
    return next((kind for kind in kinds if isinstance(module, kind)), None)


def _multiplies_rows(kind: Any) -> bool:
    """Whether it is one of transformers' embeddings whose rows come out multiplied by their `embed_scale`."""
    own = next(each for each in kind.__mro__ if "forward" in vars(each))
    return bool(own.__module__.startswith("transformers.") and own.__name__.endswith("ScaledWordEmbedding"))


@torch.no_grad()
def _computes_product(module: Any, kind: Any, weight: FrozenWeight) -> bool:
    """Tried with two inputs, where there are values; on the meta device its word is taken."""
    if weight.device.type == "meta":
        return True
    x = torch.linspace(-2, 2, 2 * weight.in_features, device=weight.device).view(2, -1).to(weight.dtype)
    try:
        expected = F.linear(x, weight.dense(), getattr(module, "bias", None))
        found = kind.forward(module, x)
        return torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
