"""The kernels in C, those in Triton by its interpreter on a CPU, and the trial that decides where they are used."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from loratune.kernels import c_blocks, c_build, triton_available
from loratune.kernels import chosen as kernels
from loratune.model import gated, norm, rotary
from tests.kernels import kernel_cases
from tests.kernels.kernel_cases import CASES

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).resolve().parents[2]
in_tiles = pytest.mark.skipif(not c_blocks.TILES, reason="the processor has no matrix unit")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(*args: str, **environment: str) -> str:
    path = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    """Each case with its traceback, from another process: Triton looks for its interpreter once, when imported."""
    results: dict[str, str | None] = json.loads(run("-m", "tests.kernels.kernel_cases", TRITON_INTERPRET="1"))
    return results


@needs_triton
@pytest.mark.parametrize("name", sorted(CASES))
def test_interpreted(name: str, interpreted: dict[str, str | None]) -> None:
    assert interpreted.keys() == CASES.keys()
    assert interpreted[name] is None, interpreted[name]


@needs_triton
def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """By the real compiler, down to machine code: the interpreter takes more than it does. Needs no GPU."""
    compiled = run("-m", "tests.kernels.triton_compiled", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert compiled.split() == ["_norm_forward", "_norm_backward", "_gated_forward", "_gated_backward", "_turn"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(CASES))
def test_on_a_gpu(name: str) -> None:
    device = torch.device("cuda")
    assert triton_available(device)
    CASES[name](device)


@pytest.mark.gpu
def test_kernels_are_used_on_a_gpu() -> None:
    found = kernels.kernels_for(torch.ones(1, device="cuda"))
    assert found is not None
    assert found.__name__ == "loratune.kernels.triton_blocks"


@pytest.mark.parametrize("name", sorted(CASES))
def test_in_c(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cases, "written_in", "c_blocks")
    CASES[name](CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    """Enough rows for several threads, which share them."""
    x, gate, up, gy = (t.to(dtype) for t in torch.randn(4, 1, 301, 96))
    cos, sin = torch.randn(2, 1, 301, 1, 24).to(dtype)
    weight = torch.rand(96) + 0.5

    def everything() -> list[Tensor]:
        y, inverse = c_blocks.norm_forward(x, weight, 1e-5)
        found = [y, inverse, c_blocks.norm_backward(gy, y, weight, inverse)]
        found += [c_blocks.gated_forward(gate, up, "gelu"), *c_blocks.gated_backward(gy, gate, up, "silu")]
        return [*found, c_blocks.rotate(x.view(1, 301, 4, 24), cos, sin, back=True)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything()
        torch.set_num_threads(3)
        together = everything()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_what_is_no_number_stays_none() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        gate = torch.tensor([[torch.nan, torch.inf, -torch.nan, 2.0]], dtype=dtype)
        for name in ("silu", "gelu", "gelu_tanh"):
            found = c_blocks.gated_forward(gate, torch.ones_like(gate), name)
            assert found.isnan().tolist() == [[True, False, True, False]]
            assert found[0, 1] == torch.inf
        y, _ = c_blocks.norm_forward(gate, torch.ones(4), 1e-5)
        assert y.isnan().all()


def test_nothing_is_written_for_no_tokens() -> None:
    for shape in ((0, 16), (1, 0, 16)):
        empty = torch.empty(shape)
        assert c_blocks.norm_forward(empty, torch.ones(16), 1e-5)[0].shape == shape
        assert c_blocks.gated_forward(empty, empty, "silu").shape == shape


def test_importing_loratune_imports_and_compiles_no_kernel() -> None:
    code = (
        "import sys, loratune.model, loratune.cli; print([m for m in sys.modules if m.startswith('loratune.kernels')])"
    )
    modules = run("-c", code)
    assert "loratune.kernels.chosen" in modules
    assert "loratune.kernels.triton_blocks" not in modules
    assert "loratune.kernels.c_blocks" not in modules


def test_a_cpu_takes_those_in_c_where_they_can_compute_it() -> None:
    for x in (torch.ones(2), torch.nn.Parameter(torch.ones(2)), torch.ones(2, dtype=torch.bfloat16)):
        found = kernels.kernels_for(x)
        assert found is not None
        assert found.__name__ == "loratune.kernels.c_blocks"
    for x in (torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float16), torch.ones(2, device="meta")):
        assert kernels.kernels_for(x) is None


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_nothing_without_memory_of_its_own_reaches_them() -> None:
    """Fake tensors, subclasses and functional transforms: what they hold is not where they say."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Other(Tensor):
        pass

    with FakeTensorMode():
        assert kernels.kernels_for(torch.ones(2)) is None
    assert kernels.kernels_for(torch.ones(2).as_subclass(Other)) is None
    x, weight = torch.randn(3, 5, 8), torch.rand(8) + 0.5
    with torch.no_grad():
        each = torch.func.vmap(lambda row: norm.rms_norm(row, weight, 1e-5))(x)
        torch.testing.assert_close(each, norm.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize(
    ("device", "installed", "capability", "available"),
    [("cuda", True, 8, True), ("cuda", True, 6, False), ("cuda", False, 8, False), ("cpu", True, 8, False)],
)
def test_where_triton_is(
    device: str, installed: bool, capability: int, available: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (capability, 0))
    assert triton_available(torch.device(device)) == available


def plain_kernels(**faults: Any) -> Any:
    """In the place of `triton_blocks`: the same by torch's own kernels, some of them at fault."""
    halves = {name: gated._Halves(name) for name in kernels._ACTIVATIONS}
    right = {
        "NAMED": "planted",
        "norm_forward": norm._forward,
        "norm_backward": norm._backward,
        "gated_forward": lambda gate, up, name: halves[name].composed(gate, up),
        "gated_backward": lambda gy, gate, up, name: halves[name].gradients(gy, gate, up),
        "rotate": lambda x, cos, sin, back=False: (rotary._turned_back if back else rotary._turned)(x, cos, sin),
        "attend_forward": c_blocks.attend_forward,
        "attend_backward": c_blocks.attend_backward,
        "in_tiles": c_blocks.in_tiles,
        "sum_of_products": c_blocks.sum_of_products,
        "cross_entropy": c_blocks.cross_entropy,
        "product_over_rows": c_blocks.product_over_rows,
        "low_rank_forward": c_blocks.low_rank_forward,
        "low_rank_backward": c_blocks.low_rank_backward,
    }
    return SimpleNamespace(**{**right, **faults})


def off_by_a_little(gy: Tensor, gate: Tensor, up: Tensor, name: str) -> tuple[Tensor, Tensor]:
    found = gated._Halves(name).gradients(gy, gate, up)
    return (found[0] + (1e-3 if name == "gelu" else 0), found[1])


def as_though_alike(dtype: torch.dtype) -> Any:
    """Attention that is wrong in one dtype."""

    def attend(q: Tensor, *told: Any) -> Any:
        return c_blocks.attend_forward(q.flip(0) if q.dtype == dtype else q, *told)

    return attend


def failing(*args: Any) -> Tensor:
    raise RuntimeError("Failed to find C compiler.\nSet CC.")


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Puts kernels in the place of those in Triton, on a CPU."""

    def plant(kernels: Any) -> None:
        module = ModuleType("loratune.kernels.triton_blocks")
        vars(module).update(vars(kernels))
        monkeypatch.setitem(sys.modules, "loratune.kernels.triton_blocks", module)
        monkeypatch.setattr("loratune.kernels.triton_blocks", module, raising=False)
        monkeypatch.setattr(sys.modules["loratune.kernels"], "triton_blocks", module, raising=False)

    monkeypatch.setattr(kernels, "_module_for", lambda _: sys.modules["loratune.kernels.triton_blocks"])
    monkeypatch.setattr(gated, "kernels_for", lambda _: None)  # what is planted is made of the plain formulas
    kernels.kernels_of.cache_clear()
    yield plant
    kernels.kernels_of.cache_clear()


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        ({}, None),
        ({"norm_forward": failing}, "RuntimeError: Failed to find C compiler.)"),
        ({"norm_backward": lambda *args: args[0]}, "the norm's gradient deviates"),
        ({"rotate": lambda *args, **_: rotary._turned(*args)}, "the rotation's gradient deviates"),
        ({"gated_forward": lambda *args: args[0] * torch.nan}, "the product with silu deviates"),
        (
            {"attend_forward": lambda q, k, v, table, _, scale: c_blocks.attend_forward(q, k, v, table, None, scale)},
            "attention deviates",
        ),
        (
            {"attend_backward": lambda gy, q, k, v, *told: c_blocks.attend_backward(gy, q, k, v.flip(0), *told)},
            "attention's gradient deviates",
        ),
        ({"gated_backward": off_by_a_little}, "the gradient of the product with gelu deviates"),
        pytest.param(
            {"sum_of_products": lambda products, scale, into: c_blocks.sum_of_products(products[:1], scale, into)},
            "the sum of products deviates",
            marks=in_tiles,
        ),
        pytest.param(
            {"product_over_rows": lambda u, v: c_blocks.product_over_rows(u[1:], v[1:])},
            "the product over rows deviates",
            marks=in_tiles,
        ),
        (
            {"cross_entropy": lambda *told: c_blocks.cross_entropy(*told) * 1.001},
            "cross-entropy deviates",
        ),
        (
            {"cross_entropy": lambda logits, *told: c_blocks.cross_entropy(logits, *told[:2], logits.clone())},
            "cross-entropy's gradient deviates",
        ),
        pytest.param(
            {"low_rank_forward": lambda x, told: c_blocks.low_rank_forward(x, [p._replace(bias=None) for p in told])},
            "W x + B A x deviates",
            marks=in_tiles,
        ),
        pytest.param(
            {"low_rank_backward": lambda x, h, *told, **more: c_blocks.low_rank_backward(x, 2 * h, *told, **more)},
            "the gradient of B deviates",
            marks=in_tiles,
        ),
        pytest.param(
            {"in_tiles": lambda _: True, "attend_forward": as_though_alike(torch.bfloat16)},
            "attention's gradient deviates",
            marks=in_tiles,
        ),
    ],
)
def test_kernels_are_tried_before_they_are_used(
    faults: dict[str, Any], says: str | None, planted: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Planted: kernels that cannot be compiled, give NaN, or are off."""
    planted(plain_kernels(**faults))
    with caplog.at_level(logging.WARNING, "loratune"), torch.inference_mode():
        for _ in range(2):
            found = kernels.kernels_of(CPU)
            assert (found.module is None) == (says is not None)
            assert says is None or says.removesuffix(")") in found.named
    assert len(caplog.messages) == (says is not None)
    assert all(says in message for message in caplog.messages if says)


def test_the_trial_is_none_of_what_the_caller_keeps(planted: Any) -> None:
    planted(plain_kernels())
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        assert kernels.kernels_of(CPU).module is not None
    assert not kept


@pytest.mark.parametrize(
    ("dtype", "used"), [(torch.float32, True), (torch.bfloat16, True), (torch.float16, True), (torch.float64, False)]
)
def test_kernels_are_not_used_in_float64(dtype: torch.dtype, used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They compute in fp32."""
    planted = kernels.Kernels(ModuleType("planted"), "planted")
    monkeypatch.setattr(kernels, "kernels_of", lambda _: planted)
    monkeypatch.setattr(kernels, "_plain", lambda _: True)
    tensor: Any = SimpleNamespace(dtype=dtype, device=torch.device("cuda"))
    assert kernels.kernels_for(tensor) is (planted.module if used else None)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; what is compiled is looked for there."""
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def test_they_are_compiled_once(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c_build.library()
    (kept,) = cached.iterdir()
    monkeypatch.setenv("CC", "no-such-compiler")
    assert c_build.library().compiler is not None
    monkeypatch.setattr(c_build, "_processor", lambda: "another")
    with pytest.raises(OSError, match=r"there is no C compiler \(no-such-compiler\)"):
        c_build.library()
    assert list(cached.iterdir()) == [kept]


@pytest.mark.parametrize("content", [b"", b"no library", None])
def test_what_is_kept_and_cannot_be_loaded_is_made_anew(content: bytes | None, cached: Path) -> None:
    """A disk that ran full, or a system with another C library that shares the home."""
    c_build.library()
    (kept,) = cached.iterdir()
    sound = kept.read_bytes()
    kept.unlink()  # written over, it would be under the feet of who has loaded it
    kept.write_bytes(sound[: len(sound) // 3] if content is None else content)
    named = run("-c", "import torch; from loratune.model import kernels_of; print(kernels_of(torch.device('cpu')))")
    assert "kernels in C, compiled by" in named
    assert kept.read_bytes() == sound


def test_another_compiler_has_a_file_of_its_own(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c_build.library()
    (first,) = cached.iterdir()
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\nexec cc "$@"\n', encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    c_build.library()
    assert len(list(cached.iterdir())) == 2
    monkeypatch.setenv("CC", "cc")
    assert c_build._kept(cached) == [first]


def test_clangs_threads_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc -D__clang__")
    with pytest.raises(OSError, match="two teams would wait for each other"):
        c_build._compile(tmp_path / "blocks.so")


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        ("no-such-compiler", "there is no C compiler (no-such-compiler)"),
        ("false", "the C compiler (false) failed: without a word"),
        ("cc --no-such-option", "the C compiler (cc --no-such-option) failed: "),
        ("true", "cannot open shared object file"),
    ],
)
def test_a_compiler_that_does_not(compiler: str, says: str, cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks are computed all the same, and it is said by what."""
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(OSError) as failed:  # noqa: PT011 - its words are looked at
        c_build.library()
    assert says in str(failed.value)
    assert not cached.exists() or not list(cached.iterdir())
    named = run("-c", "import torch; from loratune.model import kernels_of; print(kernels_of(torch.device('cpu')))")
    assert f"torch's own operations: {says}" in named or says == "cannot open shared object file" in named
    assert "module=None" in named


@pytest.mark.parametrize("name", sorted(path.name for path in c_build.SOURCE.parent.glob("*.c")))
def test_each_source_has_a_compiled_file_of_its_own(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer version never runs what an older one compiled."""
    for path in c_build.SOURCE.parent.glob("*.c"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = c_build._key()
    monkeypatch.setattr(c_build, "SOURCE", tmp_path / c_build.SOURCE.name)
    assert c_build._key() == before
    (tmp_path / name).write_text((tmp_path / name).read_text() + "/* changed */", encoding="utf-8")
    assert c_build._key() != before


def test_what_cannot_be_loaded_is_not_kept(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler for another processor, say: once it is another one, all is well."""
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho no library > "$2"\n', encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(OSError, match=r"ELF|too short"):
        c_build.library()
    assert not cached.exists()
    monkeypatch.delenv("CC")
    assert c_build.library().compiler is not None
    assert len(list(cached.iterdir())) == 1


def test_a_cache_that_may_not_be_written(cached: Path) -> None:
    cached.parent.write_text("a file in its place", encoding="utf-8")
    assert c_build.library().compiler is not None


def test_elsewhere_than_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(OSError, match="on Linux alone, not on darwin"):
        c_build.library()
