"""What a config's settings mean to each form of layer, and which of them it cannot have."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from loratune.config import LoraConfig
from loratune.config.methods import IA3, LORA
from loratune.lora import LoraConvolution, LoraLayer, LoraLookup
from loratune.quant import Form, QuantizedLinear, frozen_weight

# What a module of each form becomes.
LAYERS: dict[str, type[LoraLayer]] = {"product": LoraLayer, "lookup": LoraLookup, "convolution": LoraConvolution}

# Inits whose words mean something to an embedding; peft takes all others for the default there, in silence.
_OF_LOOKUPS = (True, False, "gaussian", "swapped")


def form_problems(form: Form, config: LoraConfig, r: int, *, of_file: bool) -> Iterator[str]:
    """Settings that a layer of this form cannot have.

    Args:
        of_file: the config describes an adapter that is there, so that only what it counts from matters of its init.
    """
    init = config.init_lora_weights
    if config.peft_type != LORA:
        taken = ("product", "convolution") if config.peft_type == IA3 else ("product",)
        if form.use not in taken:
            yield f"peft_type={config.peft_type!r} is for linear layers{' and convolutions' * (len(taken) > 1)}"
        return
    if form.use == "lookup":
        if config.lora_bias:
            yield "lora_bias=True is for layers that multiply, not for an Embedding"
        if config.decomposes if of_file else init not in _OF_LOOKUPS:
            yield f"init={init!r} is for layers that multiply: an Embedding starts with A zero and B from N(0, 1)"
    if form.use == "convolution" and init == "eva" and not of_file:
        yield "init='eva' is for linear layers, and looks at no convolution's inputs"
    if form.groups == 1:
        return
    if r % form.groups:
        up = -(-r // form.groups) * form.groups
        yield f"rank {r} is not divisible by its {form.groups} groups: give it {up} in rank_pattern"
    if config.use_dora:
        yield f"use_dora=True: a row of its weight sees one of {form.groups} groups, and the update all of them"
    if config.decomposes or init == "orthogonal":
        yield f"init={init!r}: its weight keeps {form.groups} groups apart, and factors from it would not"


def model_problems(model: nn.Module, config: LoraConfig, *, of_file: bool) -> Iterator[str]:
    """Settings that nothing of this model can have."""
    two_texts = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    if config.init_lora_weights == "eva" and two_texts and not of_file:
        yield "init='eva' is for models of one text: which tokens of two are there, no layer could tell"


def form_notes(module: nn.Module, form: Form, config: LoraConfig) -> Iterator[str]:
    """What is different at a layer of this form, as sentences."""
    if form.use == "lookup" and config.lora_dropout:
        yield f"lora_dropout={config.lora_dropout:g} drops nothing of an Embedding, whose inputs are numbers of rows"
    if form.groups > 1 and config.peft_type == LORA:
        yield f"it has {form.groups} groups, so that its update, which sees all inputs, cannot be merged"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        other = [f"dilation={module.dilation}"] if any(step != 1 for step in module.dilation) else []
        other += [f"padding_mode={module.padding_mode!r}"] if module.padding_mode != "zeros" else []
        if other:
            yield f"A has the module's {' and '.join(other)} here; peft's has not, and computes something else with it"


def keeps_original(module: nn.Module) -> bool:
    """Whether what quantising the module's weight lost is known, or will be."""
    weight = frozen_weight(module)
    planned = weight is not None and weight.device.type == "meta"  # it will be quantised once it is there
    return planned or (isinstance(module, QuantizedLinear) and bool(module.original))
