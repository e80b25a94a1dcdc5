"""The kernels in Triton, run by its interpreter on a CPU, and the trial that decides where they are used."""

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

from loratune.model import gated, norm, rotary, triton_trial
from loratune.model.device import triton_available
from tests.model.triton_cases import CASES

REPOSITORY = Path(__file__).resolve().parents[2]
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
    results: dict[str, str | None] = json.loads(run("-m", "tests.model.triton_cases", TRITON_INTERPRET="1"))
    return results


@needs_triton
@pytest.mark.parametrize("name", sorted(CASES))
def test_interpreted(name: str, interpreted: dict[str, str | None]) -> None:
    assert interpreted.keys() == CASES.keys()
    assert interpreted[name] is None, interpreted[name]


@needs_triton
def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """By the real compiler, down to machine code: the interpreter takes more than it does. Needs no GPU."""
    compiled = run("-m", "tests.model.triton_compiled", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert compiled.split() == ["_norm_forward", "_norm_backward", "_gated_forward", "_gated_backward", "_turn"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(CASES))
def test_on_a_gpu(name: str) -> None:
    device = torch.device("cuda")
    assert triton_available(device)
    CASES[name](device)


@pytest.mark.gpu
def test_kernels_are_used_on_a_gpu() -> None:
    kernels = triton_trial.kernels_for(torch.ones(1, device="cuda"))
    assert kernels is not None
    assert kernels.__name__ == "loratune.model.triton_blocks"


def test_importing_loratune_does_not_import_triton() -> None:
    code = (
        "import sys, loratune.model, loratune.cli; print([m for m in sys.modules if m.startswith('loratune.model.t')])"
    )
    modules = run("-c", code)
    assert "loratune.model.triton_trial" in modules
    assert "loratune.model.triton_blocks" not in modules


def test_a_cpu_takes_torchs_own_kernels() -> None:
    for x in (torch.ones(2), torch.ones(2, dtype=torch.float64)):
        assert triton_trial.kernels_for(x) is None


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
    halves = {name: gated._Halves(name) for name in triton_trial._ACTIVATIONS}
    right = {
        "norm_forward": norm._forward,
        "norm_backward": norm._backward,
        "gated_forward": lambda gate, up, name: halves[name].composed(gate, up),
        "gated_backward": lambda gy, gate, up, name: halves[name].gradients(gy, gate, up),
        "rotate": lambda x, cos, sin, back=False: (rotary._turned_back if back else rotary._turned)(x, cos, sin),
    }
    return SimpleNamespace(**{**right, **faults})


def off_by_a_little(gy: Tensor, gate: Tensor, up: Tensor, name: str) -> tuple[Tensor, Tensor]:
    found = gated._Halves(name).gradients(gy, gate, up)
    return (found[0] + (1e-3 if name == "gelu" else 0), found[1])


def failing(*args: Any) -> Tensor:
    raise RuntimeError("Failed to find C compiler.\nSet CC.")


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Puts kernels in the place of those in Triton, on a CPU."""

    def plant(kernels: Any) -> None:
        module = ModuleType("loratune.model.triton_blocks")
        vars(module).update(vars(kernels))
        monkeypatch.setitem(sys.modules, "loratune.model.triton_blocks", module)
        monkeypatch.setattr("loratune.model.triton_blocks", module, raising=False)
        monkeypatch.setattr(sys.modules["loratune.model"], "triton_blocks", module, raising=False)

    monkeypatch.setattr(triton_trial, "triton_available", lambda _: True)
    triton_trial._tried.cache_clear()
    yield plant
    triton_trial._tried.cache_clear()


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        ({}, None),
        ({"norm_forward": failing}, "RuntimeError: Failed to find C compiler.)"),
        ({"norm_backward": lambda *args: args[0]}, "the norm's gradient deviates"),
        ({"rotate": lambda *args, **_: rotary._turned(*args)}, "the rotation's gradient deviates"),
        ({"gated_forward": lambda *args: args[0] * torch.nan}, "the product with silu deviates"),
        ({"gated_backward": off_by_a_little}, "the gradient of the product with gelu deviates"),
    ],
)
def test_kernels_are_tried_before_they_are_used(
    faults: dict[str, Any], says: str | None, planted: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Planted: kernels that cannot be compiled, give NaN, or are off."""
    planted(plain_kernels(**faults))
    with caplog.at_level(logging.WARNING, "loratune"), torch.inference_mode():
        for _ in range(2):
            found = triton_trial._tried(torch.device("cpu"))
            assert (found is None) == (says is not None)
    assert len(caplog.messages) == (says is not None)
    assert all(says in message for message in caplog.messages if says)


def test_the_trial_is_none_of_what_the_caller_keeps(planted: Any) -> None:
    planted(plain_kernels())
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        assert triton_trial._tried(torch.device("cpu")) is not None
    assert not kept


@pytest.mark.parametrize(
    ("dtype", "used"), [(torch.float32, True), (torch.bfloat16, True), (torch.float16, True), (torch.float64, False)]
)
def test_kernels_are_not_used_in_float64(dtype: torch.dtype, used: bool, planted: Any) -> None:
    """They compute in fp32."""
    planted(plain_kernels())
    tensor: Any = SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cpu"))
    assert (triton_trial.kernels_for(tensor) is not None) == used
