"""y = l ⊙ (W x + bias), or W (l ⊙ x) + bias: a trained factor for each feature of a frozen layer's output or input.

Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv:2205.05638, section 3.3, (IA)³: outputs of keys and values, inputs of a feed-forward block's second product.

Like every adapter's, what it adds is counted from the base, so that several add up: (l - 1) ⊙ (W x + bias), and
W ((l - 1) ⊙ x). In low precision l would lose what it learned: between 1 and 2 bf16 has steps of 1/128. So l is kept in
fp32, and l - 1 is what is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Rescaling(nn.Module):
    """One adapter on one layer.

    Attributes:
        l: (features,), of the layer's inputs or its outputs; a master in fp32 unless another dtype was asked for.
        on_input: which of them. groups: of a convolution's inputs, each of which some of the outputs see alone.
    """

    l: nn.Parameter  # noqa: E741

    def __init__(self, l: Tensor, *, on_input: bool, groups: int = 1) -> None:  # noqa: E741
        super().__init__()
        self._parameters.update(l=nn.Parameter(l))
        self.on_input = on_input
        self.groups = groups

    @property
    def inner(self) -> nn.Parameter:
        return self.l

    @property
    def outer(self) -> nn.Parameter:
        return self.l

    def delta(self, weight: Tensor) -> Tensor:
        """What is added to `weight` (out_features, columns), detached, in its dtype.

        A convolution's columns are the kernels of its inputs one after the other; with groups, of those of one group.
        """
        change = self.l.detach().to(weight.dtype) - 1
        if not self.on_input:
            return weight * change[:, None]
        rows, columns = weight.shape
        by_group = change.view(self.groups, -1)
        factors = by_group.repeat_interleave(columns // by_group.shape[1], 1)
        return weight * factors.repeat_interleave(rows // self.groups, 0)

    def bias_delta(self, bias: Tensor) -> Tensor | None:
        """What is added to the layer's own bias (out_features,), detached, in its dtype; None where nothing is."""
        return None if self.on_input else bias * (self.l.detach().to(bias.dtype) - 1)

    def _load_from_state_dict(self, state_dict, prefix, *rest):  # type: ignore[no-untyped-def]
        # A checkpoint of the base alone still loads into an adapted model.
        if f"{prefix}l" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{'in' if self.on_input else 'out'}={len(self.l)}"


def summed(terms: Sequence[Rescaling], dtype: torch.dtype) -> Tensor:
    """Σ (l - 1) of some adapters, rounded once."""
    total = terms[0].l - 1
    for term in terms[1:]:
        total = total + (term.l - 1)
    return total.to(dtype)
