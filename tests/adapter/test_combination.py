"""Several adapters as one, against dense matrices in float64 (BEHAVIOUR 28)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.adapter import (
    Factors,
    Origin,
    SavedAdapter,
    card_of,
    combination,
    combine,
    config_to_json,
    read_adapter,
    write_adapter,
)
from loratune.errors import AdapterFileError, ConfigError, LoratuneError
from loratune.lora import generator_for
from tests.adapter.values import adapter, dense_of
from tests.oracle import algebra
from tests.oracle.lora_reference import Array, exact

property_test = settings(derandomize=True, deadline=None, max_examples=60, database=None)
FP32 = 3e-6  # the factors are rounded to fp32, and the updates of a sum may be larger than the sum


@dataclass(frozen=True)
class Case:
    """Adapters over some of the modules "a.q" (5, 7), "a.v" (6, 4) and "b" (3, 3), with their weights."""

    adapters: tuple[SavedAdapter, ...]
    weights: tuple[float, ...]

    def terms(self, path: str) -> tuple[list[Array], list[float]]:
        having = [(dense_of(each), weight) for each, weight in zip(self.adapters, self.weights, strict=True)]
        kept = [(deltas[path], weight) for deltas, weight in having if path in deltas]
        return [matrix for matrix, _ in kept], [weight for _, weight in kept]

    def wanted(self, path: str) -> Array:
        return algebra.weighted_sum(*self.terms(path))

    def size(self, path: str) -> float:
        """What rounding errors are measured by: the sum of the parts' sizes."""
        return sum(abs(weight) * algebra.norm(matrix) for matrix, weight in zip(*self.terms(path), strict=True))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shapes = {"a.q": (5, 7), "a.v": (6, 4), "b": (3, 3)}
    count = draw(st.integers(1, 3))
    made = []
    for number in range(count):
        paths = draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, unique=True))
        modules = {path: (draw(st.integers(1, 4)), *shapes[path]) for path in paths}
        alpha, rslora = draw(st.floats(0.25, 64)), draw(st.booleans())
        patterns = draw(st.sampled_from([{}, {"q": 3.0}, {"a.*": 0.5, "b": 9.0}]))
        seed = draw(st.integers(0, 99)) * 10 + number
        made.append(adapter(modules, alpha=alpha, rslora=rslora, alpha_pattern=patterns, seed=seed))
    weight = st.one_of(st.integers(-200, 200).map(lambda n: n / 100), st.sampled_from([0.0, 1.0, -1.0]))
    return Case(tuple(made), tuple(draw(st.lists(weight, min_size=count, max_size=count))))


def close(found: Array, wanted: Array, size: float, tolerance: float = FP32) -> bool:
    return algebra.norm(found - wanted) <= tolerance * size


# -- concat ----------------------------------------------------------------------------------------------------------


@property_test
@given(case=cases())
def test_concat_is_the_weighted_sum(case: Case) -> None:
    made = combine(case.adapters, case.weights)
    found = dense_of(made.adapter)
    assert set(found) == {path for each in case.adapters for path in each.factors}
    for path, matrix in found.items():
        assert close(matrix, case.wanted(path), case.size(path))
        ranks = [each.factors[path].A.shape[0] for each in case.adapters if path in each.factors]
        assert made.adapter.factors[path].A.shape[0] == sum(ranks)
        assert made.adapter.scale(path) == 1.0
    assert (made.error, set(made.errors.values())) == (0.0, {0.0})


def test_concat_keeps_dyadic_numbers_exactly() -> None:
    one, two = adapter({"m": (2, 3, 4)}, alpha=4), adapter({"m": (1, 3, 4)}, alpha=1, seed=1)
    A, B, *_ = combine([one, two], [0.5, -1.0]).adapter.factors["m"]
    assert A.dtype == B.dtype == torch.float32
    assert torch.equal(A, torch.cat([one.factors["m"].A, two.factors["m"].A]))
    assert torch.equal(B, torch.cat([one.factors["m"].B, -two.factors["m"].B], dim=1))


def test_factors_of_low_precision_are_folded_in_fp32() -> None:
    made = adapter({"m": (2, 5, 4)}, alpha=3)
    half = replace(made, factors={"m": Factors(*(x.bfloat16() for x in made.factors["m"][:2]))})
    result = combine([half], [0.3]).adapter
    assert result.factors["m"].B.dtype == torch.float32
    assert close(dense_of(result)["m"], 0.3 * dense_of(half)["m"], algebra.norm(dense_of(half)["m"]), 1e-6)


def test_negative_weight_takes_an_adapter_away() -> None:
    one = adapter({"m": (3, 5, 4)})
    assert algebra.norm(dense_of(combine([one, one], [1.0, -1.0]).adapter)["m"]) < 1e-6
    assert close(dense_of(combine([one], [-2.0]).adapter)["m"], -2 * dense_of(one)["m"], 100)


# -- svd -------------------------------------------------------------------------------------------------------------


@property_test
@given(case=cases(), rank=st.integers(1, 6))
def test_svd_is_the_best_of_its_rank(case: Case, rank: int) -> None:
    made = combine(case.adapters, case.weights, method="svd", rank=rank)
    missed = asked = 0.0
    for path, found in dense_of(made.adapter).items():
        wanted = case.wanted(path)
        best = algebra.best_of_rank(wanted, rank)
        size = case.size(path)
        assert made.adapter.factors[path].A.shape[0] <= rank
        # No matrix of this rank is nearer (Eckart and Young), so being as near is being a best one.
        assert algebra.norm(found - wanted) == pytest.approx(algebra.norm(best - wanted), abs=FP32 * size)
        if algebra.norm(wanted) > 1e-6 * size:
            assert made.errors[path] == pytest.approx(algebra.relative_error(wanted, best), rel=1e-6, abs=1e-8)
        missed += algebra.norm(wanted - best) ** 2
        asked += algebra.norm(wanted) ** 2
        A, B, *_ = (exact(x) for x in made.adapter.factors[path][:2])
        assert np.allclose(np.linalg.norm(A, axis=1), np.linalg.norm(B, axis=0), rtol=1e-5, atol=1e-6 * size)
    if asked > 1e-12:
        assert made.error == pytest.approx(np.sqrt(missed / asked), rel=1e-5, abs=1e-7)


def test_svd_takes_the_largest_rank_by_default() -> None:
    one, two = adapter({"m": (2, 9, 8), "n": (3, 9, 8)}), adapter({"m": (4, 9, 8)}, seed=1)
    made = combine([one, two], [1, 1], method="svd")
    assert made.adapter.factors["m"].A.shape[0] == 4
    assert made.adapter.factors["n"].A.shape[0] == 3, "nothing is gained by more than the module has"
    assert made.errors["m"] > 0.1
    assert made.errors["n"] < 1e-12


def test_svd_never_forms_the_update() -> None:
    """A dense update of 300,000 rows and columns would take 720 GB."""
    made = combine([adapter({"m": (2, 300_000, 300_000)})] * 2, [1, 2], method="svd", rank=2)
    assert made.error < 1e-9


# -- ties and dare ---------------------------------------------------------------------------------------------------


@property_test
@given(case=cases(), density=st.floats(0.05, 1.0), rank=st.integers(1, 7))
def test_ties(case: Case, density: float, rank: int) -> None:
    made = combine(case.adapters, case.weights, method="ties", density=density, rank=rank)
    for path, found in dense_of(made.adapter).items():
        matches(made, path, found, algebra.ties(*case.terms(path), density), rank)


@property_test
@given(case=cases(), density=st.floats(0.05, 1.0), rank=st.integers(1, 7), seed=st.integers(0, 9))
def test_dare(case: Case, density: float, rank: int, seed: int) -> None:
    made = combine(case.adapters, case.weights, method="dare", density=density, rank=rank, seed=seed)
    for path, found in dense_of(made.adapter).items():
        deltas, weights = case.terms(path)
        ordinals = [i for i, each in enumerate(case.adapters) if path in each.factors]
        kept = [mask(deltas[0].shape, seed, i, path) < density for i in ordinals]
        matches(made, path, found, algebra.dare(deltas, weights, density, kept), rank)


def mask(shape: tuple[int, ...], seed: int, ordinal: int, path: str, role: str = "weight") -> Array:
    return exact(torch.rand(shape, generator=generator_for(seed, ordinal, path, role), dtype=torch.float64))


def matches(made: Any, path: str, found: Array, wanted: Array, rank: int) -> None:
    """`found` is a best approximation of `wanted`, and its error is what was said."""
    best = algebra.best_of_rank(wanted, rank)
    size = algebra.norm(wanted)
    assert algebra.norm(found - wanted) == pytest.approx(algebra.norm(best - wanted), abs=FP32 * size)
    assert made.errors[path] == pytest.approx(algebra.relative_error(wanted, found), rel=1e-6, abs=FP32)


def test_ties_by_hand() -> None:
    """Two updates with rows of A as their entries: signs +, −, agreeing, and one side trimmed away."""
    one = rows([[4.0, -3.0, 2.0, 0.1], [1.0, 0.2, 0.1, 0.1]])
    two = rows([[-6.0, -1.0, 2.0, 0.2], [-1.0, 0.1, 0.2, 0.1]])
    found = dense_of(combine([one, two], [1, 1], method="ties", density=0.5, rank=2).adapter)["m"]
    # Of eight entries each keeps four: 4 −3 2 1 and −6 −1 2 −1. −6 outweighs 4; 1 and −1 cancel.
    assert np.allclose(found, [[-6, -2, 2, 0], [0, 0, 0, 0]], atol=1e-6)


def test_ties_does_not_count_who_has_no_say() -> None:
    one, two = rows([[4.0, 0.0], [0.0, 0.0]]), rows([[2.0, 8.0], [0.0, 0.0]])
    found = dense_of(combine([one, two], [1, 1], method="ties", density=1.0, rank=2).adapter)["m"]
    assert np.allclose(found, [[3, 8], [0, 0]], atol=1e-6)
    found = dense_of(combine([one, two], [1, 0], method="ties", density=1.0, rank=2).adapter)["m"]
    assert np.allclose(found, [[4, 0], [0, 0]], atol=1e-6)


def rows(values: list[list[float]]) -> SavedAdapter:
    """An adapter whose update is these numbers."""
    made = adapter({"m": (len(values), len(values[0]), len(values))}, alpha=len(values))
    return replace(made, factors={"m": Factors(torch.tensor(values), torch.eye(len(values)))})


def test_dare_repeats_with_its_seed_and_draws_for_each_adapter_and_module() -> None:
    one = adapter({"m": (2, 6, 6), "n": (2, 6, 6)})
    same = replace(one, factors=dict.fromkeys(("m", "n"), one.factors["m"]))

    def dense(seed: int, *weights: float) -> dict[str, Array]:
        return dense_of(combine([same, same], weights, method="dare", density=0.5, rank=6, seed=seed).adapter)

    first = dense(0, 1.0, 0.0)
    assert all(np.array_equal(first[path], dense(0, 1.0, 0.0)[path]) for path in first)
    assert not np.allclose(first["m"], first["n"])
    assert not np.allclose(first["m"], dense(1, 1.0, 0.0)["m"])
    assert not np.allclose(first["m"], dense(0, 0.0, 1.0)["m"])


def test_dare_keeps_the_sum_on_average() -> None:
    one = rows([[1.0] * 200] * 200)
    mean = dense_of(combine([one], [1], method="dare", density=0.3, rank=200).adapter)["m"].mean()
    # Standard error of the mean of 40,000 entries: √((1 − 0.3) / 0.3) / 200.
    assert mean == pytest.approx(1.0, abs=5 * np.sqrt(0.7 / 0.3) / 200)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_large_matrices_are_approximated_nearly_as_well(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Subspace iteration against the full decomposition, where what is kept stands out little from what is not."""
    one, two = adapter({"m": (4, 120, 90)}), adapter({"m": (4, 120, 90)}, seed=1)

    def made() -> Any:
        return combine([one, two], [0.5, 0.5], method=method, density=0.4, rank=8)

    full = made()
    monkeypatch.setattr(combination, "_LARGEST_FULL_SVD", 50)
    fast = made()
    assert not torch.equal(full.adapter.factors["m"].A, fast.adapter.factors["m"].A), "the other way must be taken"
    assert full.error <= fast.error + 1e-7
    assert fast.error == pytest.approx(full.error, rel=1e-3)
    again = made()
    assert torch.equal(fast.adapter.factors["m"].A, again.adapter.factors["m"].A)


# -- bias ------------------------------------------------------------------------------------------------------------


def test_biases_add_up_with_scale_and_weight() -> None:
    one = adapter({"m": (2, 3, 4), "n": (2, 3, 4)}, alpha=6, bias=True)
    two = adapter({"m": (1, 3, 4), "o": (1, 3, 4)}, alpha=5, seed=1)
    for method in ("concat", "svd"):
        made = combine([one, two], [0.5, 2.0], method=method).adapter
        assert made.config.lora_bias
        for path in ("m", "n"):
            assert np.allclose(exact(made.factors[path].bias), 0.5 * 3 * exact(one.factors[path].bias), rtol=1e-6)
        assert torch.equal(made.factors["o"].bias, torch.zeros(4)), "a file has a bias behind every B or behind none"  # type: ignore[arg-type]
    both = combine([one, replace(one)], [0.5, -2.0]).adapter
    assert np.allclose(exact(both.factors["m"].bias), -1.5 * 3 * exact(one.factors["m"].bias), rtol=1e-6)


def test_biases_follow_the_rule_of_ties_and_dare() -> None:
    one, two = (adapter({"m": (2, 3, 8)}, alpha=6, bias=True, seed=seed) for seed in (0, 1))
    biases = [3 * exact(each.factors["m"].bias) for each in (one, two)]
    ties = combine([one, two], [0.5, -1], method="ties", density=0.5).adapter.factors["m"].bias
    assert np.allclose(exact(ties), algebra.ties(biases, [0.5, -1], 0.5), rtol=1e-6)
    dare = combine([one, two], [0.5, -1], method="dare", density=0.5, seed=3).adapter.factors["m"].bias
    kept = [mask((8,), 3, i, "m", "bias") < 0.5 for i in (0, 1)]
    assert np.allclose(exact(dare), algebra.dare(biases, [0.5, -1], 0.5, kept), rtol=1e-6)


# -- the result ------------------------------------------------------------------------------------------------------


def test_config_of_the_result() -> None:
    one = adapter({"a.q": (2, 3, 4), "x-1.v": (3, 3, 4)}, rslora=True, lora_dropout=0.1, init_lora_weights="gaussian")
    two = adapter({"a.q": (1, 3, 4), "b": (3, 3, 4)}, seed=1)
    one = replace(one, base="somewhere", revision="main", origin=Origin(base="f00", tokenizer="aa"), unknown={"x": 1})
    two = replace(two, base="somewhere", revision="other", origin=Origin(base="f00", tokenizer="bb"))
    made = combine([one, two], [1, 1]).adapter
    config = made.config
    assert config.target_modules == ("a.q", "b", "x-1.v")
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (3, 3, {}, {})
    assert (config.use_rslora, config.lora_dropout, config.init_lora_weights, config.lora_bias) == (
        False,
        0,
        True,
        False,
    )
    assert (made.base, made.revision, made.origin) == ("somewhere", None, Origin(base="f00"))
    assert not made.unknown


def test_ranks_that_differ_are_in_exact_patterns(tmp_path: Path) -> None:
    ranks = {"layers.1.q": 2, "layers.11.q": 5, "x.layers.1.q": 3, "v": 3}
    made = combine([adapter({path: (r, 6, 7) for path, r in ranks.items()})], [1]).adapter
    assert made.config.r == made.config.lora_alpha == 3
    assert {path: made.config.rank_of(path) for path in ranks} == ranks
    assert {path: made.config.alpha_of(path) for path in ranks} == ranks
    write_adapter(tmp_path, made, card=card_of(made))
    read = read_adapter(tmp_path)
    assert config_to_json(read) == config_to_json(made)
    assert all(read.scale(path) == 1 for path in ranks)
    assert all(np.array_equal(matrix, dense_of(made)[path]) for path, matrix in dense_of(read).items())


def test_inputs_stay_as_they_are() -> None:
    one = adapter({"m": (2, 3, 4)}, bias=True)
    before = [tensor.clone() for _, tensor in one.named_tensors()]
    for method, density in (("concat", None), ("svd", None), ("ties", 0.5), ("dare", 0.5)):
        made = combine([one], [2.0], method=method, density=density)
        made.adapter.factors["m"].A.zero_()
        made.adapter.factors["m"].bias.zero_()  # type: ignore[union-attr]
    assert all(torch.equal(x, y) for x, (_, y) in zip(before, one.named_tensors(), strict=True))


# -- refusals --------------------------------------------------------------------------------------------------------

ONE, TWO = adapter({"m": (2, 3, 4)}), adapter({"m": (2, 3, 4)}, seed=1)


def refusal(adapters: Sequence[SavedAdapter], weights: Sequence[Any], **options: Any) -> LoratuneError:
    with pytest.raises(LoratuneError) as caught:
        combine(adapters, weights, **options)
    return caught.value


@pytest.mark.parametrize(
    ("weights", "options", "words"),
    [
        ([1.0], {}, "1 weights for 2 adapters"),
        ([1.0, float("nan")], {}, "weight 2 is nan"),
        ([float("-inf"), 1.0], {}, "weight 1 is -inf"),
        ([1.0, "1"], {}, "weight 2 is '1'"),
        ([1.0, True], {}, "weight 2 is True"),
        ([1, 1], {"method": "svd", "rank": 0}, "rank=0"),
        ([1, 1], {"method": "svd", "rank": 1.5}, "rank=1.5"),
        ([1, 1], {"rank": 3}, "rank=3 with concat"),
        ([1, 1], {"method": "ties", "density": 0.0}, "density=0.0 is not in (0, 1]"),
        ([1, 1], {"method": "dare", "density": 1.01}, "density=1.01 is not in (0, 1]"),
        ([1, 1], {"method": "ties", "density": float("nan")}, "density=nan"),
        ([1, 1], {"method": "ties"}, "ties needs a density"),
        ([1, 1], {"method": "svd", "density": 0.5}, "density=0.5 means nothing to svd"),
        ([1, 1], {"method": "tise"}, "no method 'tise'; did you mean 'ties'?"),
        ([1, 1], {"method": "ties", "density": "x"}, "density='x' is not in (0, 1]"),
        ([1, 1], {"method": "ties", "density": True}, "density=True is not in (0, 1]"),
        ([1, 1], {"method": "dare", "density": [0.5]}, "density=[0.5] is not in (0, 1]"),
        ([1, 1], {"method": None}, "no method None"),
        ([1, 1], {"method": ["ties"]}, "no method ['ties']; did you mean 'ties'?"),
        ([1, 1], {"method": "svd", "rank": "x"}, "rank='x'"),
        ([1, 1], {"method": "dare", "density": 0.5, "seed": "x"}, "seed='x' is no whole number"),
        ([1, 1], {"seed": None}, "seed=None is no whole number"),
        ([1e39, 1], {}, "weight 1e+39 takes adapter 1: m beyond the numbers of fp32"),
    ],
)
def test_bad_arguments(weights: list[Any], options: dict[str, Any], words: str) -> None:
    error = refusal([ONE, TWO], weights, **options)
    assert isinstance(error, ConfigError)
    assert len(error.problems) == 1
    assert words in error.problems[0]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"adapters": None}, ["adapters is a NoneType, not a list"]),
        ({"adapters": ONE}, ["adapters is a SavedAdapter, not a list"]),
        ({"adapters": {"a": ONE}}, ["adapters is a dict, not a list"]),
        (
            {"adapters": [ONE, "two", None]},
            ["adapter 2 is a str, not a SavedAdapter", "adapter 3 is a NoneType, not a SavedAdapter"],
        ),
        ({"weights": None, "names": 5}, ["weights is a NoneType, not a list", "names is a int, not a list"]),
        ({"weights": "11"}, ["weights is a str, not a list"]),
        ({"weights": {1, 2}}, ["weights is a set, not a list"]),
    ],
)
def test_arguments_of_another_kind(arguments: dict[str, Any], found: list[str]) -> None:
    error = refusal(**{"adapters": [ONE, TWO], "weights": [1, 1], **arguments})
    assert isinstance(error, ConfigError)
    assert list(error.problems) == found
    assert "read_adapter(folder)" in error.hint


def test_any_sequence_of_numbers_will_do() -> None:
    made = [combine(iter([ONE, TWO]), weights) for weights in ([0.5, 2], np.array([0.5, 2]), iter((0.5, 2)))]  # type: ignore[arg-type]
    assert {each.weights for each in made} == {(0.5, 2.0)}


def test_linear_is_refused_with_the_reason() -> None:
    error = refusal([ONE, TWO], [1, 1], method="linear")
    assert isinstance(error, ConfigError)
    assert "not a weighted sum of the updates" in str(error)
    assert "concat" in error.hint
    assert "svd" in error.hint


def test_no_adapter() -> None:
    assert "no adapter to combine" in str(refusal([], []))


def broken(**changes: Any) -> SavedAdapter:
    return replace(TWO, **changes)


def with_factors(**tensors: torch.Tensor) -> SavedAdapter:
    return replace(TWO, factors={"m": TWO.factors["m"]._replace(**tensors)})


@pytest.mark.parametrize(
    ("other", "words", "hint"),
    [
        (adapter({"m": (2, 5, 4)}), "m: 4 × 3 in adapter 1, 4 × 5 in adapter 2", "of one base"),
        (adapter({"m": (2, 3, 6)}), "m: 4 × 3 in adapter 1, 6 × 3 in adapter 2", "of one base"),
        (broken(factors={}), "adapter 2 holds no low-rank tensors", ""),
        (with_factors(magnitude=torch.ones(4)), "adapter 2 is a DoRA adapter", "merge"),
        (broken(replaced={"score.weight": torch.ones(1)}), "score.weight", "modules_to_save"),
        (with_factors(A=torch.full((2, 3), float("nan"))), "adapter 2: m: A holds NaN", ""),
        (
            broken(config=TWO.config.replace(init_lora_weights="pissa_niter_4")),
            "'pissa_niter_4'",
            "attach it to its base and save it, which writes a plain adapter",
        ),
        (broken(config=TWO.config.replace(init_lora_weights="olora")), "'olora'", "attach it to its base"),
    ],
)
def test_adapters_that_do_not_fit(other: SavedAdapter, words: str, hint: str) -> None:
    error = refusal([ONE, other], [1, 1])
    assert isinstance(error, AdapterFileError)
    assert len(error.problems) == 1
    assert words in error.problems[0]
    assert hint in error.hint


def test_other_bases() -> None:
    known = [replace(ONE, origin=Origin(base=name * 20)) for name in ("a", "b")]
    error = refusal(known, [1, 1])
    assert isinstance(error, AdapterFileError)
    assert "adapter 1 on aaaaaaaaaaaa, adapter 2 on bbbbbbbbbbbb" in str(error)
    combine([known[0], ONE], [1, 1])  # where one base is not known, nothing speaks against it


def test_all_problems_at_once_under_the_names_given() -> None:
    strange = replace(adapter({"m": (2, 5, 4)}), replaced={"head.weight": torch.ones(1)})
    error = refusal([ONE, strange], [float("nan")], method="conat", rank=0, density=2, names=["x/one", "y/two"])
    assert isinstance(error, ConfigError)
    assert len(error.problems) == 7
    assert "m: 4 × 3 in x/one, 4 × 5 in y/two" in error.problems
