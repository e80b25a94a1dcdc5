"""What a frozen weight is, whatever its storage: its shape as a map, its numbers, and how a delta is folded into it."""

from loratune.quant.adaptable import adaptable, why_not_adaptable
from loratune.quant.base import (
    dequantize,
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
from loratune.quant.form import PRODUCT, Form
from loratune.quant.formats import FORMATS, refuse_format
from loratune.quant.frozen import frozen_weight
from loratune.quant.library import bitsandbytes
from loratune.quant.linear import QuantizedLinear, QuantizedWeight
from loratune.quant.sample import Sample
from loratune.quant.stacked import StackedWeight, stacked_weight, why_not_stacked
from loratune.quant.weight import DenseWeight, FrozenWeight, rounded_once

__all__ = [
    "FORMATS",
    "PRODUCT",
    "DenseWeight",
    "Form",
    "FrozenWeight",
    "QuantizedLinear",
    "QuantizedWeight",
    "Sample",
    "StackedWeight",
    "adaptable",
    "bitsandbytes",
    "dequantize",
    "drop_originals",
    "frozen_weight",
    "keep_readable",
    "known_by",
    "lost",
    "output_head",
    "quantize",
    "quantized_format",
    "refuse_format",
    "rounded_once",
    "shapes_in_bits",
    "stored_in",
    "values_in",
    "stacked_weight",
    "why_not_adaptable",
    "why_not_stacked",
    "why_unreadable",
]
