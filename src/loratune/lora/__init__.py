"""The mathematics of low-rank adaptation; torch and nothing else."""

from loratune.lora.blocked import Blocked, blocks_help
from loratune.lora.convolution import LoraConvolution
from loratune.lora.dropout import TokenCounter
from loratune.lora.equation import LowRank, as_matrices, lora_parameters, row_norms, scale_of
from loratune.lora.eva import Directions, Seen, eva_factors, ranks_by_explained
from loratune.lora.experts import OnParameters, adapt_parameter, release_parameters
from loratune.lora.init import decomposed_factors, generator_for, initial_factors, lookup_factors, residual_factors
from loratune.lora.layer import LoraLayer, Term, adapt_in_place, release, selecting, together
from loratune.lora.linear import base_product
from loratune.lora.lookup import LoraLookup
from loratune.lora.recomputed import Recomputed, bind_recomputation, can_be_recomputed, unbind_recomputation
from loratune.lora.replaced import Tensors, give_back, replace_in
from loratune.lora.rescaled import Rescaling
from loratune.lora.retrained import OwnRows, Retraining, end_retraining, retrain_in
from loratune.lora.rows import Bank, Rows, Stack, Stacks, TokenRows, bank_of
from loratune.lora.stacked import StackedLowRank, apart, together_again
from loratune.lora.state import AdapterState, View
from loratune.lora.swap import (
    Adapting,
    Mixin,
    adapter_prefixes,
    base_modules,
    base_of,
    base_parameters,
    covered,
    has_own,
    names_by_parameter,
    patched_forward,
    put_on,
    take_off,
    wears,
)
from loratune.lora.vera import Projections, Vera, random_projections

__all__ = [
    "AdapterState",
    "Adapting",
    "Bank",
    "Blocked",
    "Directions",
    "LoraConvolution",
    "LoraLayer",
    "LoraLookup",
    "LowRank",
    "Mixin",
    "OnParameters",
    "OwnRows",
    "Projections",
    "Recomputed",
    "Rescaling",
    "Retraining",
    "Rows",
    "Seen",
    "Stack",
    "StackedLowRank",
    "Stacks",
    "Tensors",
    "Term",
    "TokenCounter",
    "TokenRows",
    "Vera",
    "View",
    "adapt_in_place",
    "adapt_parameter",
    "adapter_prefixes",
    "apart",
    "as_matrices",
    "bank_of",
    "base_modules",
    "base_of",
    "base_parameters",
    "base_product",
    "bind_recomputation",
    "blocks_help",
    "can_be_recomputed",
    "covered",
    "decomposed_factors",
    "end_retraining",
    "eva_factors",
    "generator_for",
    "give_back",
    "has_own",
    "initial_factors",
    "lookup_factors",
    "lora_parameters",
    "names_by_parameter",
    "patched_forward",
    "put_on",
    "random_projections",
    "ranks_by_explained",
    "release",
    "release_parameters",
    "replace_in",
    "residual_factors",
    "retrain_in",
    "row_norms",
    "scale_of",
    "selecting",
    "take_off",
    "together",
    "together_again",
    "unbind_recomputation",
    "wears",
]
