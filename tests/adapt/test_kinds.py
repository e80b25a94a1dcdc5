"""Every kind of layer that can be adapted, from attach to detach, against one slow reference (BEHAVIOUR 14, 34)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import loratune as lt
from loratune.adapter import combine, diff, inspect, read_adapter
from loratune.errors import AdapterFileError, AdapterStateError, TargetError
from tests.adapt.kinds import KINDS, Around, Kind, around, by_position, columns_of, factor_of, matrix_of, update_of
from tests.adapt.lifecycle import from_attach_to_detach
from tests.adapt.model import bits
from tests.oracle import lora_reference as oracle

MERGING = [name for name, kind in KINDS.items() if kind.merges]
FILES = ("adapter_model.safetensors", "adapter_config.json")


def config_of(kind: Kind, **changes: Any) -> lt.LoraConfig:
    return lt.LoraConfig(**{"r": kind.r, "lora_alpha": 3, "target_modules": ["layer"], **changes})


def move(handle: lt.Adapters, name: str | None = None, seed: int = 0) -> None:
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters(name):
            parameter.add_(torch.randn(parameter.shape, generator=dice).to(parameter.dtype) * 0.4)


def moved(name: str, **changes: Any) -> tuple[Around, Tensor, lt.Adapters]:
    model, x = around(KINDS[name])
    handle = lt.attach(model, config_of(KINDS[name], **changes))
    move(handle)
    return model, x, handle


def gap(ours: oracle.Array, reference: oracle.Array) -> float:
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True},
}
CASES = [
    (name, variant)
    for name, kind in KINDS.items()
    for variant in VARIANTS
    if (kind.biased or variant != "bias") and (kind.stretches or variant != "dora")
]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_output_and_gradients_are_the_references(name: str, variant: str) -> None:
    model, x, handle = moved(name, **VARIANTS[variant])
    layer: Any = model.layer
    (low_rank,) = handle.factors().values()
    W, update, seen = matrix_of(layer), update_of(layer, low_rank), columns_of(layer, x)
    bias = getattr(layer, "bias", None)
    y = layer(x)
    expected = oracle.forward(W, None if bias is None else oracle.exact(bias), seen, [update])
    assert gap(by_position(layer, y), expected) < 1e-5
    dice = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * dice).sum().backward()
    g = by_position(layer, dice)
    _, (of,) = oracle.gradients(W, seen, g, [update])
    to_A = of.A
    if isinstance(layer, nn.Embedding):
        # Of the table's own rows some count less, and one does not: so it is for A's columns.
        times = np.maximum(seen.sum(0), 1) if layer.scale_grad_by_freq else 1
        to_A = to_A / times
        if layer.padding_idx is not None:
            to_A[:, layer.padding_idx] = 0
    assert gap(flat(low_rank.A.grad), to_A) < 1e-5
    groups = getattr(layer, "groups", 1)
    assert gap(flat(low_rank.B.grad), own_blocks(of.B, groups)) < 1e-5
    if of.c is not None:
        assert gap(oracle.exact(low_rank.bias.grad), of.c) < 1e-5
    if of.magnitude is not None:
        assert gap(oracle.exact(low_rank.magnitude.grad), of.magnitude * factor_of(layer)) < 1e-5


def flat(tensor: Any) -> oracle.Array:
    return oracle.exact(tensor).reshape(len(tensor), -1)


def own_blocks(to_B: oracle.Array, groups: int) -> oracle.Array:
    """Of the gradient of the whole (out, r) what stands in B's own blocks."""
    rows, wide = len(to_B) // groups, to_B.shape[1] // groups
    parts = [to_B[i * rows : (i + 1) * rows, i * wide : (i + 1) * wide] for i in range(groups)]
    return np.concatenate(parts)


@pytest.mark.parametrize("name", KINDS)
def test_from_attach_to_detach(tmp_path: Path, name: str) -> None:
    plain, x = around(KINDS[name])
    from_attach_to_detach(plain, x, config_of(KINDS[name]), tmp_path, merges=KINDS[name].merges)


@pytest.mark.parametrize("name", KINDS)
def test_updates_of_several_add_up(name: str) -> None:
    model, x, handle = moved(name)
    handle.add(config_of(KINDS[name], lora_alpha=1), "other")
    move(handle, "other", seed=1)
    layer: Any = model.layer
    with handle.disabled():
        base = layer(x)
    alone = []
    for adapter in ("default", "other"):
        handle.activate(adapter)
        alone.append(layer(x) - base)
    handle.activate("default", "other")
    assert torch.allclose(layer(x), base + alone[0] + alone[1], atol=1e-5)
    if KINDS[name].merges:
        expected = model(x)
        handle.merge()
        assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.parametrize("name", MERGING)
def test_dora_merges(name: str) -> None:
    model, x, handle = moved(name, use_dora=True)
    before = {key: bits(t) for key, t in model.state_dict().items()}
    trained = model(x)
    handle.merge()
    assert torch.allclose(model(x), trained, atol=1e-5)
    handle.unmerge()
    assert {key: bits(t) for key, t in model.state_dict().items()} == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_a_coarse_base_gives_its_own_dtype(name: str, dtype: torch.dtype) -> None:
    model, x = around(KINDS[name], dtype)
    handle = lt.attach(model, config_of(KINDS[name]))
    move(handle)
    layer: Any = model.layer
    (low_rank,) = handle.factors().values()
    assert low_rank.A.dtype == torch.float32
    bias = None if getattr(layer, "bias", None) is None else oracle.exact(layer.bias)
    expected = oracle.forward(matrix_of(layer), bias, columns_of(layer, x), [update_of(layer, low_rank)])
    assert layer(x).dtype == dtype
    assert gap(by_position(layer, layer(x)), expected) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", KINDS)
def test_groups_alone_keep_an_update_from_being_merged(name: str) -> None:
    model, _, handle = moved(name)
    if KINDS[name].merges:
        handle.merge(keep_base=False)
        return
    before = {key: bits(t) for key, t in model.state_dict().items()}
    groups = model.layer.groups
    with pytest.raises(AdapterStateError, match=rf"layer\.weight: its {groups} groups are apart in the weight"):
        handle.merge()
    assert {key: bits(t) for key, t in model.state_dict().items()} == before
    assert not handle.merged


@pytest.mark.parametrize("name", KINDS)
def test_what_is_said_of_a_file_is_said_of_the_dense_update(tmp_path: Path, name: str) -> None:
    model, _, handle = moved(name)
    handle.add(config_of(KINDS[name]), "other")
    move(handle, "other", seed=3)
    saved, other = handle.saved("default"), handle.saved("other")
    layer: Any = model.layer
    dense = [oracle.dense(update_of(layer, handle.factors(n)["layer"])) / factor_of(layer) for n in handle.names]
    (module,) = inspect(saved).modules
    sigma = np.linalg.svd(dense[0], compute_uv=False)
    assert module.spectrum is not None
    assert np.allclose(module.spectrum.singular_values, sigma[: len(module.spectrum.singular_values)], rtol=1e-5)
    assert (module.inner, module.outer) == dense[0].shape[::-1]
    assert abs(diff(saved, other).total.distance - np.linalg.norm(dense[0] - dense[1])) < 1e-5
    if not KINDS[name].merges:
        with pytest.raises(AdapterFileError, match="is a convolution with groups"):
            combine([saved, other], [1, -2])
        return
    total = combine([saved, other], [1, -2]).adapter
    handle.load(total, "sum", any_base=True)
    made = update_of(layer, handle.factors("sum")["layer"])
    assert gap(oracle.dense(made) / factor_of(layer), dense[0] - 2 * dense[1]) < 1e-5
    handle.save(tmp_path, "sum")
    assert read_adapter(tmp_path).factors["layer"].looked_up == KINDS[name].is_lookup


@pytest.mark.parametrize("name", ["Mine", "Embedding", "scaled", "Conv2d", "circular", "groups"])
def test_it_is_one_graph(name: str) -> None:
    model, x, handle = moved(name)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), model(x), atol=1e-5)
    with handle.disabled():
        assert torch.allclose(compiled(x), model(x), atol=1e-5)
    torch._dynamo.reset()


# -- the start ---------------------------------------------------------------------------------------------------------

INITS = ("gaussian", "swapped", "orthogonal", "pissa", "pissa_niter_4", "olora", False)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", KINDS)
def test_every_init_starts_at_the_base_or_is_refused_by_name(name: str, init: Any) -> None:
    kind = KINDS[name]
    model, x = around(kind)
    before = model(x)
    config = config_of(kind, init_lora_weights=init)
    decomposing = init in ("orthogonal", "pissa", "pissa_niter_4", "olora")
    if decomposing and (kind.is_lookup or not kind.merges):
        with pytest.raises(TargetError, match=f"layer: init={init!r}"):
            lt.attach(model, config)
        assert bits(model(x)) == bits(before)
        return
    lt.attach(model, config)
    assert torch.allclose(model(x), before, atol=1e-6) == (init is not False)
    starts_at_zero = init == "swapped" or (kind.is_lookup and init is not False)
    assert lt.adapters(model).factors()["layer"].A.any() != starts_at_zero


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_update_that_counts_from_its_start_is_saved_as_a_plain_one(tmp_path: Path, name: str, init: str) -> None:
    if KINDS[name].is_lookup:
        return
    model, x, handle = moved(name, init_lora_weights=init)
    handle.save(tmp_path)
    again, _ = around(KINDS[name])
    lt.attach(again, tmp_path)
    assert torch.allclose(again(x), model(x), atol=1e-5)


# -- peft --------------------------------------------------------------------------------------------------------------

# To peft a convolution's A has zeros around its input and no dilation, whatever the module has.
AS_PEFT = [name for name in KINDS if name not in ("dilated", "circular", "reflected", "Mine")]
BOTH = [(name, variant) for name, variant in CASES if name in AS_PEFT]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "variant"), BOTH)
def test_peft_reads_ours(tmp_path: Path, name: str, variant: str) -> None:
    model, x, handle = moved(name, **VARIANTS[variant])
    handle.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(around(KINDS[name])[0], tmp_path).eval()
    assert torch.allclose(theirs(x), model(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "variant"), BOTH)
def test_ours_reads_pefts(tmp_path: Path, name: str, variant: str) -> None:
    kind = KINDS[name]
    config = {"r": kind.r, "lora_alpha": 3, "target_modules": ["layer"], **VARIANTS[variant]}
    base, x = around(kind)
    theirs = peft.get_peft_model(base, peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4) if parameter.requires_grad else None
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model, _ = around(kind)
    handle = lt.attach(model, tmp_path / "theirs")
    assert torch.allclose(model(x), theirs(x), atol=1e-5)
    handle.save(tmp_path / "ours")
    ours, first = (lt_tensors(tmp_path / folder) for folder in ("ours", "theirs"))
    assert ours.keys() == first.keys()
    assert all(torch.equal(ours[key], first[key]) for key in ours)


def lt_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(folder / FILES[0]))


# -- convolutions as they are drawn ------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=30, database=None)
@given(
    dimensions=st.integers(1, 3),
    groups=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    kernel=st.integers(1, 3),
    mode=st.sampled_from(["zeros", "circular", "replicate", "reflect"]),
    seed=st.integers(0, 1000),
)
def test_any_convolution_is_the_dense_one(
    dimensions: int, groups: int, stride: int, padding: int, dilation: int, kernel: int, mode: str, seed: int
) -> None:
    """With groups too: there the update is that of a convolution without, whose weight is the dense s · B A."""
    size = 5 if dimensions < 3 else 4
    size = max(size, dilation * (kernel - 1) + 1)
    mode = "replicate" if mode == "reflect" and dimensions == 3 and padding >= size else mode
    make: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]

    def layer() -> nn.Module:
        return make(2 * groups, 2 * groups, kernel, stride, padding, dilation, groups, padding_mode=mode)  # type: ignore[no-any-return]

    kind = Kind(layer, lambda: torch.randn(2, 2 * groups, *(size for _ in range(dimensions))), r=2 * groups)
    model, x = around(kind, seed=seed)
    handle = lt.attach(model, config_of(kind))
    move(handle, seed=seed)
    found: Any = model.layer
    update = update_of(found, handle.factors()["layer"])
    expected = oracle.forward(matrix_of(found), oracle.exact(found.bias), columns_of(found, x), [update])
    assert gap(by_position(found, found(x)), expected) < 1e-5
