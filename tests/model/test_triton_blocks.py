"""The CUDA kernels of the fused blocks, run by Triton's interpreter on any processor, and on a device if there is."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune.model import gated, norm, rotary
from loratune.model.kernels import triton_for

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ["gated", "gated_backward", "rms_norm", "rms_norm_backward", "rotated"]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton has no wheel for this system"
)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "tests.model.interpreted"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@needs_triton
def test_as_exact_as_torchs_own_operations(interpreted: dict[str, Any]) -> None:
    found = interpreted["deviations"]
    assert len(found) > 30
    for name, ways in found.items():
        fine = "float32" in name
        assert ways["aten"] <= (2e-6 if fine else 4e-3), name
        # The interpreter cuts off what a device rounds when it stores bf16: up to a whole unit instead of half of one.
        assert ways["triton"] <= (1e-6 if fine else 8e-3), name


@needs_triton
def test_every_kernel_was_run(interpreted: dict[str, Any]) -> None:
    assert interpreted["used"] == KERNELS


def test_a_cpus_tensors_are_computed_by_torch() -> None:
    assert triton_for(torch.zeros(1)) is None


def test_training_on_a_cpu_imports_no_triton() -> None:
    code = (
        "import sys, loratune, torch; from loratune.model.norm import rms_norm; "
        "rms_norm(torch.randn(2, 8, requires_grad=True), torch.ones(8), 1e-5).sum().backward(); "
        "print('loratune.model.triton_blocks' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_device_as_on_the_processor(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    formulas: list[Any] = [
        (lambda x: norm.rms_norm(x, torch.linspace(0.5, 1.5, 576, dtype=x.dtype, device=x.device), 1e-5)),
        (lambda x: gated._Gated.apply(x, x.detach() + 1, gated._Halves("silu"))),
        (lambda x: rotary.rotated(x.unflatten(-1, (9, 64)), *_angles(x)).flatten(2)),
    ]
    for formula in formulas:
        results = []
        for device in ("cpu", "cuda"):
            x = torch.linspace(-3, 3, 40 * 576).sin().mul(3).view(1, 40, 576).to(device, dtype).requires_grad_()
            assert (triton_for(x) is not None) == (device == "cuda")
            y = formula(x)
            results.append((y.cpu(), torch.autograd.grad(y, x, torch.ones_like(y))[0].cpu()))
        for a, b in zip(*results, strict=True):
            assert (a.double() - b.double()).norm() <= (1e-5 if dtype == torch.float32 else 8e-3) * a.double().norm()


def _angles(x: torch.Tensor) -> list[torch.Tensor]:
    angle = torch.linspace(0, 6, 40 * 64, device=x.device).view(1, 40, 1, 64)
    return [angle.cos().to(x.dtype), angle.sin().to(x.dtype)]
