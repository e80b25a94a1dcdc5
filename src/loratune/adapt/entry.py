"""What the handle knows about one adapter beside its tensors."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratune.adapt.placement import Placement
from loratune.adapt.plan import TargetPlan
from loratune.adapt.written import written
from loratune.adapter import Factors, Origin, SavedAdapter, Stack
from loratune.config import LoraConfig
from loratune.errors import AdapterStateError
from loratune.lora import Rescaling, StackedLowRank, Vera


@dataclass(frozen=True)
class Entry:
    config: LoraConfig
    plan: TargetPlan
    base: str | None
    revision: str | None = None
    origin: Origin | None = None
    unknown: dict[str, Any] = field(default_factory=dict)
    # Of one that was loaded: what its model card says about it.
    about: str = ""
    # Of the adapters that were made here: which of the seed's starts it has.
    ordinal: int = 0
    # Whether it still starts as any other would, and not from data (`initialise`).
    waits: bool = False

    @classmethod
    def of(cls, saved: SavedAdapter, plan: TargetPlan) -> Entry:
        """Of an adapter that is loaded."""
        unknown = dict(saved.unknown)
        return cls(saved.config, plan, saved.base, saved.revision, saved.origin, unknown, saved.about)


def refuse_waiting(name: str, entry: Entry) -> None:
    """Raise where the adapter has not got its start from data yet."""
    if entry.waits:
        raise AdapterStateError(
            f"{name!r} starts from data (init='eva'), which it has not seen",
            hint="lora.initialise(batches) before its optimizer is made",
        )


def as_value(placement: Placement, name: str, entry: Entry, origin: Origin) -> SavedAdapter:
    """One adapter as a value that shares the live tensors; its targets are written out by name."""
    refuse_waiting(name, entry)
    factors, vectors = {}, {}
    projections = None
    lookups = {target.path for target in entry.plan.targets if target.form.use == "lookup"}
    shapes = {target.path: target.shapes[0] for target in entry.plan.targets}
    filed = {target.path: target.filed for target in entry.plan.targets}
    for path, term in placement.terms(name).items():
        if isinstance(term, Rescaling):
            vectors[path] = {"l": term.l.detach().view(shapes[path])}
            continue
        if isinstance(term, Vera):
            vectors[path] = {"d": term.d.detach(), "b": term.b.detach()}
            projections = term.projections.A, term.projections.B
            continue
        A, B = term.factors()
        if isinstance(term, StackedLowRank):
            stack = Stack(term.experts, entry.config.alpha_of(path), path)
            factors[filed[path]] = Factors(A.detach(), B.detach(), stack=stack)
            continue
        bias, magnitude = (None if t is None else t.detach() for t in (term.bias, term.magnitude))
        factors[path] = Factors(A.detach(), B.detach(), bias, magnitude, path in lookups)
    replaced = {
        full: _no_finer(parameter.detach(), placement.base_tensor(full).dtype)
        for full, parameter in placement.replaced(name).items()
    }
    config = written(placement.model, entry.config, entry.plan)
    return SavedAdapter(
        config, factors, replaced, entry.base, entry.revision, origin, entry.unknown,
        about=entry.about, vectors=vectors, projections=projections if config.save_projection else None,
    )  # fmt: skip


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """What `save_pretrained` of a tokenizer writes, by file name; nothing without one."""
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def _no_finer(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A finer master as the model computes with it: in the base's dtype."""
    return tensor.to(dtype) if tensor.dtype.itemsize > dtype.itemsize else tensor
