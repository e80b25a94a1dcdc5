"""Whether a saved adapter's tensors are those that its config asks for on this model."""

from __future__ import annotations

from pathlib import Path

from loratune.adapt.plan import TargetPlan
from loratune.adapter import SavedAdapter
from loratune.errors import AdapterFileError


def check_fit(target_plan: TargetPlan, saved: SavedAdapter, path: Path) -> None:
    targets = {target.path: target for target in target_plan.targets}
    problems = [
        f"{path}: no tensors for {name}, which its config targets" for name in targets if name not in saved.factors
    ]
    for name, (A, B) in saved.factors.items():
        if name not in targets:
            problems.append(f"{path}: tensors for {name}, which this model lacks or the config does not target")
            continue
        target = targets[name]
        expected = (target.r, target.in_features), (target.out_features, target.r)
        if (tuple(A.shape), tuple(B.shape)) != expected:
            problems.append(
                f"{path}: {name}: A {tuple(A.shape)} and B {tuple(B.shape)}, expected {expected[0]} and {expected[1]}"
            )
    if problems:
        raise AdapterFileError(problems, hint="the adapter belongs to another base, or its folder is damaged")
