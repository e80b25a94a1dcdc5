"""A base whose linear layers are kept in few bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from loratune.errors import ConfigError
from loratune.quant.formats import refuse_format
from loratune.quant.linear import QuantizedLinear, QuantizedWeight
from loratune.quant.sample import Sample
from loratune.quant.weight import DenseWeight, dense_weight


def quantize(
    model: nn.Module,
    format: str,
    *,
    device: torch.device | None = None,
    keep_originals: bool = False,
    without: Iterable[str] = (),
) -> int:
    """Keep a model's linear layers in few bits, as `loratune.adapt.quantize` says; nothing may stand on them.

    Args:
        without: paths of modules that stay as they are, with all that is in them: those that will train whole.
    """
    left = {id(module) for path in without for module in model.get_submodule(path).modules()}
    found = [layer for layer in _dense_layers(model) if id(layer[2]) not in left]
    refuse_format(format, (device or next((weight.device for *_, weight in found), torch.device("cpu"))).type)
    if not found:
        raise ConfigError(f"quant={format!r}: this model has no linear layers to quantise", hint="leave it out")
    for parent, name, child, _ in found:
        parent._modules[name] = QuantizedLinear.of(child, format, device=device, keep_original=keep_originals)
    return len(found)


def output_head(model: Any) -> nn.Module | None:
    """The module that gives the logits of a language model."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return head if isinstance(head, nn.Module) else None


def dequantize(model: nn.Module) -> int:
    """Put dense layers back in the place of quantised ones, with the weights that the bits stand for; says how many."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, QuantizedLinear)
    ]
    for parent, name, child in found:
        parent._modules[name] = child.decoded()
    return len(found)


def _dense_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module, DenseWeight]]:
    """Parent, name, module and weight of each linear layer but the head whose weight is dense and its own."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    head = output_head(model)
    for parent in model.modules():
        for name, child in parent._modules.items():
            weight = None if child is None or child is head else dense_weight(child)
            if child is not None and weight is not None and owners[id(weight.parameter)] == 1:
                yield parent, name, child, weight


def quantized_format(model: nn.Module) -> str | None:
    """The format of the model's quantised layers; None where it has none."""
    return next((module.format for module in model.modules() if isinstance(module, QuantizedLinear)), None)


def lost(module: nn.Module) -> Tensor | None:
    """W - Q, in fp32 (out, in): what quantising the module's weight lost, where the weight was kept; else None."""
    if not isinstance(module, QuantizedLinear) or not module.original:
        return None
    found = QuantizedWeight(module).dense(torch.float32)
    return module.original[0].to(found.device, torch.float32) - found


def drop_originals(model: nn.Module) -> None:
    """Let go of the weights that `keep_originals` held."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.original = ()


def known_by(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Tensor | Sample]]:
    """Each tensor of a base by its name, tied ones once; of a quantised weight what it was known by before."""
    seen: set[int] = set()
    for path, module in modules:
        dot = f"{path}." if path else ""
        if isinstance(module, QuantizedLinear):
            yield f"{dot}weight", module.sample
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{dot}{name}", parameter


def stored_in(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor that a base holds by its name, tied ones once; of a quantised weight what it is stored in."""
    seen: set[int] = set()
    for path, module in modules:
        own = module._parameters | (module._buffers if isinstance(module, QuantizedLinear) else {})
        for name, tensor in own.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield (f"{path}.{name}" if path else name), tensor


def values_in(module: nn.Module) -> int:
    """How many numbers of the base the module's own buffers stand for."""
    return module.in_features * module.out_features if isinstance(module, QuantizedLinear) else 0


def shapes_in_bits(model: nn.Module) -> list[tuple[int, int]]:
    """(out, in) of every weight that is quantised, or would be by `quantize`."""
    found = [(m.out_features, m.in_features) for m in model.modules() if isinstance(m, QuantizedLinear)]
    return found + [(weight.out_features, weight.in_features) for *_, weight in _dense_layers(model)]
