"""What a step takes in memory and time, from shapes alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from loratune.adapt import TargetPlan
from loratune.loss import positions_at_once
from loratune.model import pairs_at_once
from loratune.quant import FORMATS, frozen_weight, output_head, quantized_format, shapes_in_bits

_MASTER = 4  # bytes of fp32, in which masters, gradients and moments are


@dataclass(frozen=True, slots=True)
class Shape:
    """The widths that decide a model's memory and arithmetic.

    Attributes:
        query, kv: widths of all query heads together, and of all key heads.
        intermediate: width of the feed-forward block; of all experts that a token goes through together.
        normed: widths of all that a layer's norms give.
        vocabulary: what the model chooses among: tokens, or labels.
        linears: weights of the linear layers but the output head that a token meets: of experts, its own.
    """

    layers: int
    hidden: int
    intermediate: int
    query: int
    kv: int
    heads: int
    normed: int
    vocabulary: int
    linears: int = 0

    @property
    def head(self) -> int:
        """Weights of the output head."""
        return self.hidden * self.vocabulary

    @classmethod
    def of(cls, model: Any) -> Shape:
        """From a transformers model, which may be on the meta device; missing fields take the usual ratios."""
        text: Any = model.config.get_text_config()
        hidden = text.hidden_size
        heads = getattr(text, "num_attention_heads", 1)
        dim = getattr(text, "head_dim", None) or hidden // heads
        kv = (getattr(text, "num_key_value_heads", None) or heads) * dim
        layers = text.num_hidden_layers
        normed = _normed(model, {"q": heads * dim, "k": kv}) // layers
        experts = _Experts.of(text)
        linears = _linears(model, experts, leave=output_head(model))
        choices = text.vocab_size if output_head(model) is not None else model.config.num_labels
        return cls(layers, hidden, _intermediate(text, experts), heads * dim, kv, heads, normed, choices, linears)


def _first(config: Any, *names: str) -> int:
    """The first of these fields that the config has a number in, or 0."""
    return next((value for name in names if (value := getattr(config, name, None))), 0)


@dataclass(frozen=True, slots=True)
class _Experts:
    """How many a layer has, and through how many of them a token goes; 0 of 0 where it has none."""

    there: int
    chosen: int

    @classmethod
    def of(cls, config: Any) -> _Experts:
        there = _first(config, "num_local_experts", "num_experts", "n_routed_experts")
        return cls(there, _first(config, "num_experts_per_tok", "num_experts_per_token") if there else 0)


def _intermediate(config: Any, experts: _Experts) -> int:
    """Of the widest kind of layer: some families have layers without experts between those that have some."""
    dense = _first(config, "intermediate_size", "n_inner", "ffn_dim") or 4 * config.hidden_size
    if not experts.chosen:
        return dense
    own = _first(config, "moe_intermediate_size")
    shared = _first(config, "shared_expert_intermediate_size") or own * _first(config, "n_shared_experts")
    return max(dense, own * experts.chosen + shared) if own else dense * experts.chosen + shared


def _linears(model: nn.Module, experts: _Experts, leave: nn.Module | None) -> int:
    found = 0
    for path, module in model.named_modules():
        weight = frozen_weight(module)
        if weight is not None and module is not leave:
            one_of_them = experts.chosen and _ONE_EXPERT.search(path)
            size = weight.in_features * weight.out_features
            found += size * experts.chosen // experts.there if one_of_them else size
        stacked = [p for p in module._parameters.values() if p is not None and p.ndim == 3 and len(p) == experts.there]
        found += sum(p[0].numel() * experts.chosen for p in stacked)
    return found


_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")  # where each is a module of its own


def _normed(model: nn.Module, of_heads: dict[str, int]) -> int:
    """Widths of what the model's norms give; those of heads give all of these at once."""
    found = 0
    for path, module in model.named_modules():
        name, weight = path.rpartition(".")[2], module._parameters.get("weight")
        if weight is not None and weight.ndim == 1 and ("norm" in name or "ln_" in name):
            found += of_heads.get(name[:1], weight.numel()) if name[1:2] == "_" else weight.numel()
    return found


@dataclass(frozen=True, slots=True)
class Pass:
    """What goes through the model at once, and how.

    Attributes:
        itemsize: bytes of a value of the base's dtype. tokens: of a micro-batch; scored: those that get logits.
        longest: tokens of its longest row.
        recompute: whether only each layer's input is kept. fused: whether norms and gated blocks keep less.
        device_type: decides how many positions have logits at once, and how many pairs of tokens scores.
        ends_early: whether the last layer is computed at scored positions only.
    """

    itemsize: int
    tokens: int
    scored: int
    longest: int
    recompute: bool = False
    fused: bool = True
    device_type: str = "cpu"
    ends_early: bool = False


@dataclass(frozen=True, slots=True)
class BaseMemory:
    """Bytes of a base.

    Attributes:
        constants: what quantised weights are decoded with. decoded: what stands beside them while the largest is.
        in_layers: those of the weights that stand in the decoder's layers, where that was asked.
    """

    weights: int
    constants: int = 0
    decoded: int = 0
    in_layers: int = 0

    @classmethod
    def of(cls, model: Any, itemsize: int, quant: str | None, *, in_layers: Sequence[nn.Module] = ()) -> BaseMemory:
        """Of a model in a dtype of `itemsize` bytes, with its linear layers in a format of few bits or not.

        The model may be quantised already, or on the meta device.
        """
        dense = sum(p.numel() for p in model.parameters()) * itemsize
        if quant is None:
            return cls(dense, in_layers=sum(p.numel() for layer in in_layers for p in layer.parameters()) * itemsize)
        held, shapes = FORMATS[quant], shapes_in_bits(model)
        sizes = [out * inner for out, inner in shapes]
        if quantized_format(model) is None:
            dense -= sum(sizes) * itemsize
        codes, constants = (sum(part) for part in zip(*map(held.bytes_of, shapes), strict=True))
        return cls(dense + codes, constants, max(sizes) * (itemsize + held.decoded_bytes))


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes at the peak of a step.

    Attributes:
        base: its weights, in its dtype or quantised. constants: what quantised ones are decoded with.
        masters: what trains, in fp32. gradients: of these. optimizer: what it keeps of each, Adam's both moments.
        activations: kept for the backward pass, with what trains rounded to the base's dtype.
        logits: what stands beside them for a moment where the loss is formed. layer: where one layer's gradients are.
        gathered: where each process keeps a part of the above, what is whole for as long as it is needed.
    """

    base: int
    constants: int
    masters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    layer: int
    gathered: int = 0

    @property
    def adapter(self) -> int:
        """What training holds of each trained parameter."""
        return self.masters + self.gradients + self.optimizer

    @property
    def working(self) -> int:
        """The larger of what stands there for a moment; never both."""
        return max(self.logits, self.layer)

    @property
    def total(self) -> int:
        return self.base + self.constants + self.adapter + self.gathered + self.activations + self.working


def bytes_per_token(shape: Shape, plan: TargetPlan, itemsize: int, *, recompute: bool, fused: bool) -> tuple[int, int]:
    """Of each token: what is kept until the backward pass, and what stands beside it while a layer's is computed."""
    ranks = sum(target.r * target.form.met for target in plan.targets) / shape.layers
    layer = _layer_bytes(shape, itemsize, fused) + ranks * itemsize
    gradients = _block_gradients(shape, itemsize)
    if recompute:
        return shape.hidden * itemsize * shape.layers, int(layer + gradients)
    return int(layer * shape.layers), gradients


def _block_gradients(shape: Shape, itemsize: int) -> int:
    """Of each token: the activation, the gradients of its product and of both halves, of a block's input and output."""
    return (4 * shape.intermediate + 2 * shape.hidden) * itemsize


def _products(shape: Shape, through: Pass) -> int:
    """What the backward pass of attention holds: probabilities and their gradient, queries, keys, values, gradients."""
    pairs = pairs_at_once(through.device_type, through.tokens, through.longest)
    return (2 * pairs * shape.heads + through.tokens * (3 * shape.query + 4 * shape.kv)) * through.itemsize


def _layer_bytes(shape: Shape, itemsize: int, fused: bool) -> int:
    """What one layer keeps of a token: the inputs of its projections, and what its attention and activation need."""
    fine = max(itemsize, 4)
    attention = (2 * shape.query + 2 * shape.kv) * itemsize
    norms, gated = shape.normed * itemsize, 2 * shape.intermediate * itemsize
    if not fused:  # fp32 copies of the norms' inputs; the activation and its product with the other half
        norms, gated = norms + shape.normed * fine, 2 * gated
    return attention + norms + gated


def estimate_memory(
    plan: TargetPlan,
    shape: Shape,
    through: Pass,
    base: BaseMemory,
    *,
    optimizer: int | None = None,
    parts: int = 1,
) -> MemoryEstimate:
    """The peak of a step: where the loss is formed everything is kept, and a chunk of logits stands beside it.

    Args:
        base: what the model itself holds.
        optimizer: bytes that it keeps; Adam's two moments in fp32 unless told.
        parts: among how many processes weights, gradients and moments are divided; the rest is each one's own.
    """
    size = through.itemsize
    kept, layer = bytes_per_token(shape, plan, size, recompute=through.recompute, fused=through.fused)
    # A and B in the base's dtype, of all layers or of the one that is computed again; where a kernel rounds them, none.
    rounded = plan.trainable * size // (shape.layers if through.recompute else 1)
    chunk, fine = positions_at_once(through.device_type, through.scored)
    # Logits and their gradient in the base's dtype, probabilities of a few positions in fp32, and what stands before
    # the head, with its gradient.
    logits = (2 * chunk * size + fine * 4) * shape.vocabulary + 2 * through.scored * shape.hidden * size
    if _trains_head(plan, shape):  # its gradient as it was gathered, multiplied, and in its master's dtype
        logits += shape.head * (2 * size + _MASTER)
    beside = through.tokens * (layer - _block_gradients(shape, size)) + _products(shape, through)
    trained = plan.trainable * _MASTER
    return MemoryEstimate(
        base=_part(base.weights, parts),
        constants=base.constants,
        masters=_part(trained, parts),
        gradients=_part(trained, parts),
        optimizer=_part(2 * trained if optimizer is None else optimizer, parts),
        gathered=_gathered(base, trained, shape.layers) if parts > 1 else 0,
        activations=through.tokens * kept - _left_out(shape, through) + rounded,
        logits=logits,
        layer=max(through.tokens * layer, beside) + base.decoded,
    )


def _left_out(shape: Shape, through: Pass) -> int:
    """What a last layer that ends early does not keep: behind its keys and values, of tokens that are not scored."""
    if not through.ends_early or through.recompute:
        return 0
    of_token = 2 * shape.query + shape.hidden + 2 * shape.intermediate
    return (through.tokens - through.scored) * of_token * through.itemsize


def _part(size: int, parts: int) -> int:
    return -(-size // parts)


def _gathered(base: BaseMemory, trained: int, layers: int) -> int:
    """What no layer holds is whole throughout a pass; of the layers the present one is, and the next on its way."""
    return base.weights - base.in_layers + 2 * ((base.in_layers + trained) // layers)


def _trains_head(plan: TargetPlan, shape: Shape) -> bool:
    return any(part.multiplied == shape.head for part in plan.replaced)


def step_flops(plan: TargetPlan, shape: Shape, tokens: int, scored: int, *, recompute: bool) -> float:
    """Floating-point operations of a step.

    4 a token for each frozen weight of a linear layer, 2 more for one that trains, 6 for each of a low-rank term's; the
    head's are counted at scored positions.
    """
    trained = [part.multiplied for part in plan.replaced if part.multiplied != shape.head]
    low_rank = sum(target.multiplied for target in plan.targets)
    body = (6 if recompute else 4) * shape.linears + 2 * sum(trained) + 6 * low_rank
    heads = 6 if _trains_head(plan, shape) else 4
    return float(tokens * body + heads * scored * shape.head)
