"""What a frozen weight is, whatever its storage: its shape as a map, its numbers, and how a delta is folded into it."""

from loratune.quant.base import (
    decode,
    drop_originals,
    known_by,
    lost,
    output_head,
    quantize,
    quantized_format,
    shapes_in_bits,
    stored_in,
    values_in,
)
from loratune.quant.foreign import keep_readable, why_unreadable
from loratune.quant.formats import FORMATS
from loratune.quant.frozen import frozen_weight
from loratune.quant.linear import QuantizedLinear
from loratune.quant.sample import Sample
from loratune.quant.weight import DenseWeight, FrozenWeight, rounded_once

__all__ = [
    "FORMATS",
    "DenseWeight",
    "FrozenWeight",
    "QuantizedLinear",
    "Sample",
    "decode",
    "drop_originals",
    "frozen_weight",
    "keep_readable",
    "known_by",
    "lost",
    "output_head",
    "quantize",
    "quantized_format",
    "rounded_once",
    "shapes_in_bits",
    "stored_in",
    "values_in",
    "why_unreadable",
]
