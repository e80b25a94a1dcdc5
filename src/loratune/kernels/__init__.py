"""What computes in the place of torch's operations where it is faster: in C on a processor, in Triton on CUDA."""

from loratune.kernels.adapted import Adapted
from loratune.kernels.chosen import Kernels, kernels_for, kernels_of, triton_available
from loratune.kernels.deviation import deviation, furthest
from loratune.kernels.lanes import Lane, LaneTable, Range, lanes_of, table_of
from loratune.kernels.low_rank import adapted_in_tiles, gradients_in_tiles
from loratune.kernels.products import has_tiles, product_over_rows, sum_in_tiles, sum_of_products

__all__ = [
    "Adapted",
    "Kernels",
    "Lane",
    "LaneTable",
    "Range",
    "adapted_in_tiles",
    "deviation",
    "furthest",
    "gradients_in_tiles",
    "has_tiles",
    "kernels_for",
    "kernels_of",
    "lanes_of",
    "product_over_rows",
    "sum_in_tiles",
    "sum_of_products",
    "table_of",
    "triton_available",
]
