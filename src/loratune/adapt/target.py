"""One module to adapt: what trains there, and how much of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loratune.config.methods import IA3, LORA, VERA
from loratune.quant import PRODUCT, Form


@dataclass(frozen=True, slots=True)
class Target:
    """A module or parameter to adapt. `path` is its dotted name; the update is scale · B A with A (r, in), B (out, r).

    Attributes:
        vectors: how many of length out_features train beside them: a bias behind B, DoRA's magnitude.
        form: what its weight is applied to; an embedding has a column for each row that it looks up, a stack an update
            for each expert.
        method: another one than LoRA trains vectors instead: VeRA's have r and out_features values, (IA)³'s one for
            each input or output, which `on_input` says.
        inside: where peft's files keep a parameter's tensors.
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
    inside: str = ""

    @property
    def filed(self) -> str:
        """The path under which a file has its tensors."""
        return self.inside or self.path

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
        """Numbers that each token is multiplied by: of an embedding's A none, of a stack those that it goes through."""
        if self.method == VERA:
            return self.r * (self.in_features + self.out_features)
        looked_up = math.prod(self.shapes[0]) if self.form.use == "lookup" else 0
        return (self.parameters - looked_up) * self.form.met // self.form.experts

    @property
    def frozen(self) -> int:
        """Elements of the weight that stays frozen."""
        return self.in_features * self.out_features * self.form.experts
