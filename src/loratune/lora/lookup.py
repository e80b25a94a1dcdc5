"""An embedding that adds its active adapters to its output: A x is a column of A, x being a row's number."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from loratune.errors import AdapterStateError
from loratune.lora.dropout import TokenCounter
from loratune.lora.equation import LowRank
from loratune.lora.layer import LoraLayer
from loratune.lora.rows import Rows
from loratune.lora.state import View
from loratune.lora.swap import base_of


class LoraLookup(LoraLayer):
    """As in peft, what is looked up is not dropped, and the column of `padding_idx` gets no gradient."""

    def _alone(self, x: Tensor, view: View) -> LowRank | None:
        del x, view
        return None

    def _update(self, x: Tensor, low_rank: LowRank, counter: TokenCounter | None, y: Tensor) -> Tensor:
        del counter
        A, B = low_rank.factors()
        options: Any = self
        # Its gradient is dense, also where the table's would be sparse: it is as small as A.
        h = F.embedding(
            x, A.T, padding_idx=options.padding_idx, scale_grad_by_freq=options.scale_grad_by_freq
        )  # fmt: skip
        return F.linear((h * low_rank.scale * factor_of_rows(self)).to(y.dtype), B.to(y.dtype))

    def _mixed(self, x: Tensor, y: Tensor, rows: Any) -> Tensor:
        if not isinstance(rows, Rows):
            raise AdapterStateError(
                "an adapter of an embedding was given tokens that stand in no rows",
                hint="activate() one such adapter at a time, or rows() for a whole batch",
            )
        update = rows.looked_up(self, x)
        return y if update is None else y + (update * factor_of_rows(self)).to(y.dtype)


def factor_of_rows(module: Any) -> float | Tensor:
    """What an embedding multiplies its rows by: Gemma rounds it to the table's dtype, BART has a number."""
    if base_of(type(module)).forward is nn.Embedding.forward:
        return 1.0
    factor: float | Tensor = module.embed_scale
    return factor.to(module._parameters["weight"].dtype) if isinstance(factor, Tensor) else factor
