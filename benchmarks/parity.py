"""Are both sides' gradients those of the plain formula? `python parity.py JOB RESULT`; fails when they are not.

The reference: fp32, row by row, no padding, logits of every position, cross-entropy over the supervised ones in fp64:
where the model is nearly certain, what fp32 leaves of 1 - p puts gradients off by 3e-5, all of them in one way.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import side_ours
import side_peft
import torch
import torch.nn.functional as F
from job import Job, Row, Workload
from torch import Tensor
from weights import load_model

# Of a tensor. torch's cross-entropy in fp32 takes peers further off the reference: 2.3e-4 was seen, of dense rows.
LARGEST = {"ours": 1e-4, "peft-best": 5e-4}
LONGEST = 1024  # tokens of a row: all logits and layers of a large model have to stand in fp32 at once
SIDES = {"ours": side_ours.gradients, "peft-best": side_peft.gradients}


class NoParityError(Exception):
    """A side computes something else: its speed is no result."""


def deviation(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
    """Norms of the differences by those of the reference: `whole` of all gradients, `worst` of one tensor."""
    if found.keys() != reference.keys():
        odd = sorted(found.keys() ^ reference.keys())
        raise NoParityError(f"gradients of other tensors: {', '.join(odd[:4])}")
    parts = {name: (float((found[name] - right).norm()), float(right.norm())) for name, right in reference.items()}
    flat = sum(norm == 0 for _, norm in parts.values())
    if flat:
        raise NoParityError(f"{flat} tensors have no gradient: nothing is compared")
    whole = (sum(d * d for d, _ in parts.values()) / sum(n * n for _, n in parts.values())) ** 0.5
    return {"whole": whole, "worst": max(d / n for d, n in parts.values())}


def check(deviations: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Raise unless every side's fp32 gradients are the reference's."""
    for side, by_dtype in deviations.items():
        worst = by_dtype["fp32"]["worst"]
        if not worst <= LARGEST[side]:  # also of NaN
            raise NoParityError(f"{side}: an fp32 gradient is {worst:.1e} off the reference: no speed counts")


def reference(job: Job, rows: Sequence[Row]) -> dict[str, Tensor]:
    """The plain formula's gradients in fp32, of a loss in fp64."""
    plain = replace(job, side="peft", dtype="fp32")
    model = side_peft.adapted(plain, load_model(job.base, "fp32", job.device))
    supervised = sum(row.targets for row in rows)
    for row in rows:
        ids = torch.tensor([row.ids], device=job.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
        targets = torch.tensor(row.labels[1:], device=job.device)
        (F.cross_entropy(logits, targets, reduction="sum") / supervised).backward()
    return side_peft.named_gradients(model)


def deviations(job: Job, workload: Workload) -> dict[str, dict[str, dict[str, float]]]:
    """Side → dtype → deviation of its step-one gradients."""
    right = reference(job, workload.rows)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for side, gradients in SIDES.items():
        for dtype in dict.fromkeys(("fp32", job.dtype)):
            _give_back()
            got = gradients(replace(job, side=side, dtype=dtype), workload)
            found.setdefault(side, {})[dtype] = deviation(got, right)
    return found


def _give_back() -> None:
    """Models hold each other in circles: the one before would stand beside the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parity_rows(rows: Sequence[Row], count: int = 3) -> list[Row]:
    """Few rows to compare: the two that begin alike for longest, so that sharing is compared too, and the shortest.

    Cut where they are long and are scored before the cut.
    """
    ordered = sorted((_cut(row) for row in rows), key=lambda row: row.ids)
    pairs = list(pairwise(ordered))
    if not pairs:
        return ordered
    alike = max(pairs, key=lambda pair: _alike(*pair) / (len(pair[0].ids) + len(pair[1].ids)))
    others = [row for row in sorted(ordered, key=lambda row: len(row.ids)) if all(row is not one for one in alike)]
    return [*alike, *others[: count - 2]]


def _cut(row: Row) -> Row:
    cut = Row(row.ids[:LONGEST], row.supervised[:LONGEST])
    return cut if cut.targets else row


def _alike(one: Row, other: Row) -> int:
    length = 0
    for a, b in zip(one.ids, other.ids, strict=False):
        if a != b:
            break
        length += 1
    return length


def shown(found: Mapping[str, Any]) -> str:
    """`fp32: ours 1e-06, peft-best 2e-06; bf16: …`: of all gradients, and of the worst tensor."""
    by_dtype: dict[str, list[str]] = {}
    for side, dtypes in found.items():
        for dtype, values in dtypes.items():
            by_dtype.setdefault(dtype, []).append(f"{side} {values['whole']:.1e} (worst {values['worst']:.1e})")
    return "; ".join(f"{dtype}: {', '.join(sides)}" for dtype, sides in by_dtype.items())


def main() -> None:
    job = Job.read(sys.argv[1])
    found = deviations(job, Workload.read(job.workload))
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")
    check(found)


if __name__ == "__main__":
    main()
