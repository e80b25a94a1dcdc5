"""Two adapters beside each other, against dense matrices in float64 (BEHAVIOUR 29)."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.adapter import Factors, Origin, SavedAdapter, diff
from loratune.errors import AdapterFileError, ConfigError
from tests.adapter.values import adapter, dense_of
from tests.oracle import algebra

SHAPES = {"a.q": (5, 7), "a.v": (6, 4), "b": (3, 3)}


@st.composite
def adapters(draw: st.DrawFn, which: int) -> SavedAdapter:
    paths = draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True))
    modules = {path: (draw(st.integers(1, 4)), *SHAPES[path]) for path in paths}
    patterns = draw(st.sampled_from([{}, {"q": 3.0}, {"a.*": 0.5, "b": 9.0}]))
    alpha, rslora, seed = draw(st.floats(0.25, 64)), draw(st.booleans()), draw(st.integers(0, 99))
    return adapter(modules, alpha=alpha, rslora=rslora, alpha_pattern=patterns, seed=2 * seed + which)


@settings(derandomize=True, deadline=None, max_examples=80, database=None)
@given(a=adapters(0), b=adapters(1))
def test_against_dense_matrices(a: SavedAdapter, b: SavedAdapter) -> None:
    found = diff(a, b)
    dense_a, dense_b = dense_of(a), dense_of(b)
    assert {module.path for module in found.modules} == dense_a.keys() & dense_b.keys()
    assert set(found.only_a) == dense_a.keys() - dense_b.keys()
    assert set(found.only_b) == dense_b.keys() - dense_a.keys()
    for module in found.modules:
        x, y = dense_a[module.path], dense_b[module.path]
        is_distance(module, x, y)
        (Ux, Vx), (Uy, Vy) = algebra.directions(x), algebra.directions(y)
        assert module.input_overlap == pytest.approx(algebra.overlap(Vx, Vy), rel=1e-8, abs=1e-12)
        assert module.output_overlap == pytest.approx(algebra.overlap(Ux, Uy), rel=1e-8, abs=1e-12)
    both = [
        {path: each.get(path, np.zeros(shape[::-1])) for path, shape in SHAPES.items()} for each in (dense_a, dense_b)
    ]
    flat = [np.concatenate([matrix.ravel() for matrix in each.values()])[None] for each in both]
    is_distance(found.total, *flat)


def is_distance(found: Any, x: Any, y: Any) -> None:
    assert found.norm_a == pytest.approx(algebra.norm(x), rel=1e-10)
    assert found.norm_b == pytest.approx(algebra.norm(y), rel=1e-10)
    assert found.distance == pytest.approx(algebra.norm(x - y), rel=1e-10)
    assert found.ratio == pytest.approx(algebra.norm(y) / algebra.norm(x), rel=1e-10)
    assert found.relative == pytest.approx(algebra.norm(x - y) / max(algebra.norm(x), algebra.norm(y)), rel=1e-10)
    assert found.cosine == pytest.approx(algebra.cosine(x, y), rel=1e-8, abs=1e-12)


def test_an_adapter_and_itself() -> None:
    one = adapter({"m": (3, 5, 6), "n": (3, 5, 6)}, bias=True)
    found = diff(one, replace(one))
    for each in (*found.modules, found.total):
        assert (each.distance, each.relative, each.ratio) == (0.0, 0.0, 1.0)
        assert each.cosine == pytest.approx(1, abs=1e-14)
    assert all(m.input_overlap == pytest.approx(1) == m.output_overlap for m in found.modules)
    assert (found.only_a, found.only_b, found.settings, found.tensors) == ((), (), {}, ())


def test_nearly_equal_adapters_have_an_accurate_distance() -> None:
    """‖a‖² + ‖b‖² − 2⟨a, b⟩ has no correct digit here; the distance of the stored numbers has eight."""
    one = adapter({"m": (4, 30, 20)})
    A, B, *_ = one.factors["m"]
    near = replace(one, factors={"m": Factors(A.double(), B.double() * (1 + 2**-30))})
    dense = dense_of(one)["m"]
    (module,) = diff(one, near).modules
    assert module.distance == pytest.approx(algebra.norm(dense) * 2**-30, rel=1e-6)
    exact = algebra.norm(dense - dense_of(near)["m"])
    squares = algebra.norm(dense) ** 2 + module.norm_b**2 - 2 * float(np.sum(dense * dense_of(near)["m"]))
    assert module.distance == pytest.approx(exact, rel=1e-6)
    assert np.sqrt(abs(squares)) != pytest.approx(exact, rel=0.1), "or this test says nothing"


def test_one_update_in_other_factors_is_the_same_update() -> None:
    one = adapter({"m": (3, 5, 6)}, alpha=6)
    A, B, *_ = one.factors["m"]
    mixing = torch.tensor([[2.0, 1, 0], [0, 1, 3], [0, 0, 0.5]]).double()
    other = replace(
        adapter({"m": (3, 5, 6)}, alpha=3),
        factors={"m": Factors(mixing @ A.double(), 2 * B.double() @ torch.linalg.inv(mixing))},
    )
    (module,) = diff(one, other).modules
    assert module.relative < 1e-13
    assert module.input_overlap == pytest.approx(1)
    assert module.output_overlap == pytest.approx(1)


def test_known_overlaps() -> None:
    """Inputs 0-2 against 1-4 share two of three directions; outputs have none in common."""
    a = only(torch.eye(9)[:3], torch.eye(8)[:, :3])
    b = only(torch.eye(9)[1:5], torch.eye(8)[:, 4:])
    (module,) = diff(a, b).modules
    assert module.input_overlap == pytest.approx(2 / 3)
    assert module.output_overlap == pytest.approx(0)
    assert module.cosine == pytest.approx(0)
    # A direction that is not used counts for nothing: three of four are left, and 0-2 share two with 1-3.
    b = only(torch.eye(9)[1:5], torch.eye(8)[:, 4:] * torch.tensor([1, 1, 1, 1e-8]))
    (module,) = diff(a, b).modules
    assert module.input_overlap == pytest.approx(2 / 3)
    b = only(torch.eye(9)[1:5], torch.eye(8)[:, 4:] * torch.tensor([1, 1e-8, 1e-8, 1e-8]))
    (module,) = diff(a, b).modules
    assert module.input_overlap == pytest.approx(1)


def only(A: torch.Tensor, B: torch.Tensor) -> SavedAdapter:
    r = len(A)
    return replace(adapter({"m": (r, 9, 8)}, alpha=r), factors={"m": Factors(A.clone(), B.clone())})


def test_untrained_adapters() -> None:
    zero = only(torch.ones(2, 9), torch.zeros(8, 2))
    (module,) = diff(zero, zero).modules
    assert asdict(module) == {
        "norm_a": 0.0,
        "norm_b": 0.0,
        "distance": 0.0,
        "ratio": None,
        "relative": 0.0,
        "cosine": None,
        "path": "m",
        "input_overlap": None,
        "output_overlap": None,
    }
    (module,) = diff(zero, only(torch.eye(9)[:2], torch.eye(8)[:, :2])).modules
    assert (module.ratio, module.cosine, module.input_overlap) == (None, None, None)
    assert module.relative == pytest.approx(1)


def test_nothing_in_common() -> None:
    found = diff(adapter({"layers.10.q": (2, 3, 4), "layers.2.q": (2, 3, 4)}), adapter({"v": (2, 3, 4)}))
    assert (found.modules, found.only_a, found.only_b) == ((), ("layers.2.q", "layers.10.q"), ("v",))
    assert found.total.cosine == 0.0
    assert found.total.distance == pytest.approx(np.hypot(found.total.norm_a, found.total.norm_b))


def test_settings_and_tensors_that_differ() -> None:
    one = replace(adapter({"m": (2, 3, 4)}, alpha=8, bias=True), base="here", origin=Origin(base="f00"))
    two = replace(adapter({"m": (2, 3, 4)}, alpha=4, bias=True), base="there", origin=Origin(base="ba5"))
    found = diff(one, two)
    assert found.settings == {"lora_alpha": (8.0, 4.0), "base": ("here", "there"), "origin.base": ("f00", "ba5")}
    assert found.tensors == ("m: bias",), "equal numbers, but half the scale"
    A, B, *_ = two.factors["m"]
    dora = replace(two, factors={"m": Factors(A, B, None, torch.ones(4))}, replaced={"score.weight": torch.ones(2)})
    assert diff(one, dora).tensors == ("m: bias", "m: magnitude", "score.weight")
    assert diff(dora, dora).tensors == ()
    assert diff(dora, replace(dora, replaced={"score.weight": torch.zeros(2)})).tensors == ("score.weight",)


def test_what_is_no_adapter_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        diff("a/folder", None)  # type: ignore[arg-type]
    assert caught.value.problems == (
        "the first is a str, not a SavedAdapter",
        "the second is a NoneType, not a SavedAdapter",
    )
    assert "read_adapter(folder)" in caught.value.hint


def test_refusals_list_everything() -> None:
    one, two = adapter({"m": (2, 3, 4), "n": (2, 3, 4)}), adapter({"m": (2, 5, 4), "n": (2, 3, 6)})
    two.factors["n"].A[0, 0] = float("nan")
    with pytest.raises(AdapterFileError) as caught:
        diff(one, two)
    assert caught.value.problems == (
        "m: 4 × 3 in one and 4 × 5 in the other",
        "n: 4 × 3 in one and 6 × 3 in the other",
        "the second adapter: n: A holds NaN or infinity",
    )
    assert caught.value.hint
