"""One module to adapt: what trains there, and how much of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loratune.config.methods import IA3, LORA, VERA
from loratune.quant import PRODUCT, Form


@dataclass(frozen=True, slots=True)
class Target:
    """One module to adapt. `path` is its dotted name; the update is scale · B A with A (r, in), B (out, r).

    `vectors` counts those of length out_features that train beside them: a bias behind B, DoRA's magnitude. `form` says
    what its weight is applied to; an embedding has a column for each row that it looks up. Of another method than LoRA
    vectors train instead of A and B: VeRA's have r and out_features values, (IA)³'s one for each input or output, which
    `on_input` says.
    """

    path: str
    kind: str
    in_features: int
    out_features: int
    r: int
    scale: float
    vectors: int = 0
    form: Form = PRODUCT
    method: str = LORA
    on_input: bool = False

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of A and of B; of VeRA's d and b; of (IA)³'s l, as it stands in a file."""
        if self.method == VERA:
            return (self.r,), (self.out_features,)
        if self.method == IA3:
            return (self._factors_shape(),)
        return self.form.factors(self.r, self.in_features, self.out_features)

    def _factors_shape(self) -> tuple[int, ...]:
        if self.form.use == "convolution":
            inputs = self.in_features * self.form.groups // math.prod(self.form.kernel)
            return (1, inputs if self.on_input else self.out_features, *(1,) * len(self.form.kernel))
        return (1, self.in_features) if self.on_input else (self.out_features, 1)

    @property
    def what(self) -> int | str:
        """The rank; of (IA)³ what is rescaled."""
        return self.r if self.method != IA3 else "inputs" if self.on_input else "outputs"

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.shapes)) + self.vectors * self.out_features

    @property
    def multiplied(self) -> int:
        """Numbers that each token is multiplied by; of an embedding's A it is one column that is looked up."""
        if self.method == VERA:
            return self.r * (self.in_features + self.out_features)
        return self.parameters - (math.prod(self.shapes[0]) if self.form.use == "lookup" else 0)

    @property
    def frozen(self) -> int:
        """Elements of the weight that stays frozen."""
        return self.in_features * self.out_features
