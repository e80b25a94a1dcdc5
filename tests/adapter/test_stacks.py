"""Adapters of stacked experts as values: looked at, compared and combined expert by expert, without their base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import loratune as lt
from loratune.adapter import combine, diff, inspect, plain, read_adapter
from loratune.errors import AdapterFileError, TargetError
from tests.adapt.test_parameters import config, gap, logits, move, moved
from tests.models import tiny


def deltas(handle: lt.Adapters) -> dict[str, Tensor]:
    return {
        f"{path}.{e}": low_rank.scale * (B.detach().double() @ A.detach().double())
        for path, low_rank in handle.factors().items()
        for e, (A, B) in enumerate(low_rank.parts())
    }


def two(tmp_path: Path, **changes: Any) -> tuple[Any, Any, Any, Any]:
    """Two adapters of one base as files, and their handles."""
    handles = []
    for seed, name in enumerate("ab"):
        model = tiny("mixtral")
        handle = lt.attach(model, config(target_modules=["q_proj"], **(changes if name == "b" else {})))
        move(handle, seed=seed)
        handle.save(tmp_path / name)
        handles.append(handle)
    return read_adapter(tmp_path / "a"), read_adapter(tmp_path / "b"), *handles


def test_inspect_and_diff_look_at_each_expert(tmp_path: Path) -> None:
    a, b, left, right = two(tmp_path)
    dense = deltas(left), deltas(right)
    filed = {target.filed: target.path for target in left.plan().stacks}

    def called(path: str) -> str:
        owner, _, number = path.rpartition(".")
        return f"{filed[owner]}.{number}" if owner in filed else f"{path}.0"

    seen = inspect(a)
    assert {called(module.path) for module in seen.modules} == dense[0].keys()
    for module in seen.modules:
        expected = torch.linalg.svdvals(dense[0][called(module.path)])[:3]
        found = torch.tensor(module.spectrum.singular_values, dtype=torch.float64)
        assert gap(found, expected) < 1e-6
    between = diff(a, b)
    for module in between.modules:
        x, y = (some[called(module.path)] for some in dense)
        assert module.distance == pytest.approx(float((x - y).norm()), rel=1e-6)
        assert module.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-6)
    assert diff(a, left.saved()).total.relative < 1e-7, "a file and the live one are called alike"


@pytest.mark.parametrize("settings", [{"method": "concat"}, {"method": "svd", "rank": 2}])
def test_combining_sums_each_expert(tmp_path: Path, settings: dict[str, Any]) -> None:
    a, b, left, right = two(tmp_path, r=2, use_rslora=True)
    combined = combine([a, b], [0.7, -0.4], **settings)
    model = tiny("mixtral")
    handle = lt.attach(model, combined.adapter)
    found, dense = deltas(handle), (deltas(left), deltas(right))
    for path, each in found.items():
        exact = 0.7 * dense[0][path] - 0.4 * dense[1][path]
        U, S, Vh = torch.linalg.svd(exact)
        best = exact if settings["method"] == "concat" else U[:, :2] * S[:2] @ Vh[:2]
        assert gap(each, best) < 1e-6, path
    handle.save(tmp_path / "sum")
    other = tiny("mixtral")
    lt.attach(other, tmp_path / "sum")
    assert torch.equal(logits(other), logits(model))


def test_ties_of_experts(tmp_path: Path) -> None:
    a, _, left, _ = two(tmp_path)
    combined = combine([a], [2.0], method="ties", density=1.0, rank=3)
    handle = lt.attach(tiny("mixtral"), combined.adapter)
    for path, each in deltas(handle).items():
        assert gap(each, 2 * deltas(left)[path]) < 1e-6


def test_what_only_the_base_tells(tmp_path: Path) -> None:
    """The order of a module's parameters is in no file: ranks that differ between them cannot be told apart there."""
    a, b, left, right = two(tmp_path, rank_pattern={"experts.down_proj": 2})
    for use in (lambda: inspect(b), lambda: diff(a, b), lambda: combine([a, b], [1, 1])):
        with pytest.raises(AdapterFileError, match=r"only its base tells the ranks of .*experts") as caught:
            use()
        assert "attach it to its base" in caught.value.hint
    known = right.saved()
    assert {module.r for module in inspect(known).modules if "experts.base_layer" in module.path} == {3}
    assert {module.r for module in inspect(known).modules if module.path[-1].isdigit()} == {2, 3}
    assert diff(left.saved(), known).total.distance > 0


def test_adapters_on_other_parameters_are_not_compared(tmp_path: Path) -> None:
    a, b, _, _ = two(tmp_path, target_parameters=("experts.gate_up_proj",))
    with pytest.raises(AdapterFileError, match="they name other parameters, whose tensors stand under the same paths"):
        diff(a, b)
    with pytest.raises(AdapterFileError, match="they name other parameters"):
        combine([a, b], [1, 1])


def test_readers_of_linear_layers_are_not_given_stacks() -> None:
    _, handle = moved()
    with pytest.raises(
        AdapterFileError, match=r"vLLM is given linear layers alone, no stacked experts: model\.layers\.0"
    ):
        plain(handle.saved(), "vLLM")


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    _, handle = moved()
    handle.save(tmp_path)
    with pytest.raises(AdapterFileError, match=r"gate_up_proj: A \(12, 32\) and B \(128, 12\), expected \(24, 32\)"):
        lt.attach(tiny("mixtral", num_local_experts=8), tmp_path)
    with pytest.raises(TargetError, match=r"target_parameters: 'experts\.gate_up_proj' matches no parameter"):
        lt.attach(tiny("llama"), tmp_path)
