"""A model that will answer, and not be trained."""

from __future__ import annotations

from transformers import PreTrainedModel

from loratune.model import prepare_decoding, why_not_fused, why_not_packed


def make_ready(model: PreTrainedModel) -> str | None:
    """Have a model answer as fast as it can from now on: packed rows, fused blocks, weights as few tokens want them.

    Takes a pass or two, and memory for a copy of the weights where there is plenty; for more than one answer.

    Returns:
        None, or why its rows cannot be packed, in which case it stays what it was.
    """
    why_not = why_not_packed(model)
    if why_not is None:
        why_not_fused(model)  # a family without such blocks answers as it is
        prepare_decoding(model)
    return why_not
