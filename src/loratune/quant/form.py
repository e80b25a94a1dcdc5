"""How a module uses its weight, and what the factors of an update of it look like beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Shape = tuple[int, ...]
Use = Literal["product", "lookup", "convolution", "stack"]


@dataclass(frozen=True, slots=True)
class Form:
    """As a matrix (out_features, in_features) a convolution's weight has its kernels flattened.

    Attributes:
        use: "product" with the last dimension of an input, "lookup" of columns by their numbers, "convolution", or a
            "stack" of products, of which each token meets some.
        kernel: a convolution's sizes. groups: of its inputs, each of which some of the outputs see alone.
        experts: how many products a stack has. met: through how many of them a token goes.
    """

    use: Use = "product"
    kernel: Shape = ()
    groups: int = 1
    experts: int = 1
    met: int = 1

    def factors(self, r: int, in_features: int, out_features: int) -> tuple[Shape, Shape]:
        """The shapes of A and B. A sees all inputs; with groups, those of the outputs see as many of A's rows each.

        Those of a stack are peft's: A has the experts one above the other, B all experts' first columns before their
        second ones.
        """
        if self.use == "stack":
            return (self.experts * r, in_features), (out_features, r * self.experts)
        channels = in_features * self.groups // math.prod(self.kernel)
        points = (1,) * len(self.kernel)
        return (r, channels, *self.kernel), (out_features, r // self.groups, *points)


PRODUCT = Form()
