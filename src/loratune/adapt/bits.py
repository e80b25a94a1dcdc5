"""The format in which a model's linear layers are kept, changed while nothing stands on them."""

from __future__ import annotations

import torch
from torch import nn

from loratune.adapt.attach import refuse_adapted
from loratune.quant import dequantize as to_dense
from loratune.quant import quantize as to_bits


def quantize(model: nn.Module, format: str, *, device: torch.device | None = None, keep_originals: bool = False) -> int:
    """Keep a model's linear layers in few bits: each gives way to one that decodes its weight for each product.

    Embeddings, norms and the output head stay as they are, and so does what shares its weight with another module.

    Args:
        format: "nf4" or "int8".
        device: where the stored tensors go, if not where the weights are; the rest of the model stays where it is.
        keep_originals: hold on to the weights as they were, which `init_lora_weights="loftq"` starts from.

    Returns:
        How many layers were replaced.

    Raises:
        ConfigError: no such format, not on this device, or no linear layers. MissingExtraError: the format's package is
            missing. AdapterStateError: the model has adapters.
    """
    refuse_adapted(model, hint="quantise the base first, then attach")
    _end_decoding(model)
    return to_bits(model, format, device=device, keep_originals=keep_originals)


def dequantize(model: nn.Module) -> int:
    """Put dense layers in the place of quantised ones, with the weights that their bits stand for.

    Returns:
        How many layers were replaced.

    Raises:
        AdapterStateError: the model has adapters.
    """
    refuse_adapted(model, hint="save the adapter, detach it, and load it again afterwards with any_base=True")
    _end_decoding(model)
    return to_dense(model)


def _end_decoding(model: nn.Module) -> None:
    """Copies of weights would stay with the layers that give way."""
    # Not imported above: a model of plain torch needs no transformers.
    from loratune.model import end_decoding

    end_decoding(model)
