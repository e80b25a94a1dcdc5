"""Each loop of `examples/loops` in a process of its own on a tiny model: what it leaves on the disk and in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import loratune as lt
from tests.adapter.cases import gap, logits
from tests.models import saved

REPOSITORY = Path(__file__).resolve().parents[2]
LOOPS = REPOSITORY / "examples" / "loops"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("base"))


def run(folder: Path, script: str, *arguments: str | Path) -> dict[str, Any]:
    """The losses, the base's tensors and some logits that the script ended with."""
    left = folder / "left.pt"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY), str(LOOPS)]),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    command = [sys.executable, "-m", "tests.examples.after_loop", str(left), str(LOOPS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{arguments[1]} holds the adapter" in done.stdout
    found: dict[str, Any] = torch.load(left, weights_only=True)
    return found


def check(base: Path, out: Path, left: dict[str, Any], *, quant: str | None = None) -> None:
    """It learned, the base has its bits, and PEFT's files give the logits that the model had, here and in peft."""
    losses = left["losses"]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    fresh = AutoModelForCausalLM.from_pretrained(base).eval()
    if quant is not None:
        lt.quantize(fresh, quant)
    assert all(torch.equal(tensor, left["base"][name]) for name, tensor in fresh.state_dict().items())
    before = logits(fresh)
    lt.attach(fresh, out)
    assert torch.equal(logits(fresh), left["logits"])
    assert gap(before, left["logits"]) > 0.1
    if quant is None:
        theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval()
        assert gap(logits(theirs), left["logits"]) < 1e-5


@pytest.mark.parametrize("script", ["hf_trainer.py", "trl_sft.py", "trl_dpo.py", "lightning_module.py"])
def test_it_trains_an_adapter(base: Path, tmp_path: Path, script: str) -> None:
    out = tmp_path / "out"
    check(base, out, run(tmp_path, script, base, out))
    checkpoints = list((out / "checkpoints").iterdir())
    held = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert checkpoints
    assert not list(out.rglob("model.safetensors"))
    if script == "lightning_module.py":
        (first, *_) = checkpoints
        assert all(".lora." in name for name in torch.load(first, weights_only=False)["state_dict"])
    assert all(path.stat().st_size < 2 * held for path in out.rglob("*") if path.is_file())


def test_a_loop_with_accelerate_trains_an_adapter(base: Path, tmp_path: Path) -> None:
    check(base, tmp_path / "out", run(tmp_path, "accelerate_loop.py", base, tmp_path / "out"))


@pytest.mark.full
def test_a_loop_with_accelerate_is_the_same_compiled(base: Path, tmp_path: Path) -> None:
    left = run(tmp_path, "accelerate_loop.py", base, tmp_path / "plain")
    again = run(tmp_path, "accelerate_loop.py", base, tmp_path / "compiled", "aot_eager")
    check(base, tmp_path / "compiled", again)
    assert again["losses"] == pytest.approx(left["losses"], rel=1e-4)


@pytest.mark.full
def test_the_trainer_goes_on_from_its_checkpoint(base: Path, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    whole = run(tmp_path, "hf_trainer.py", base, straight)
    run(tmp_path, "hf_trainer.py", base, broken)
    for later in (24, 32):
        for path in sorted((broken / "checkpoints" / f"checkpoint-{later}").iterdir()):
            path.unlink()
        (broken / "checkpoints" / f"checkpoint-{later}").rmdir()
    again = run(tmp_path, "hf_trainer.py", base, broken, "--resume")
    assert again["losses"] == whole["losses"]
    assert torch.equal(again["logits"], whole["logits"])


@pytest.mark.full
def test_lightning_goes_on_from_its_checkpoint(base: Path, tmp_path: Path) -> None:
    whole = run(tmp_path, "lightning_module.py", base, tmp_path / "straight")
    (checkpoint, *_) = sorted((tmp_path / "straight" / "checkpoints").iterdir())
    again = run(tmp_path, "lightning_module.py", base, tmp_path / "broken", checkpoint)
    assert 0 < len(again["losses"]) < len(whole["losses"])
    check(base, tmp_path / "broken", {**again, "losses": whole["losses"]})


@pytest.mark.full
@pytest.mark.parametrize(
    ("options", "quant"), [(["--quantize", "nf4"], "nf4"), (["--compile", "aot_eager"], None)], ids=["nf4", "compiled"]
)
def test_the_trainer_with_options(base: Path, tmp_path: Path, options: list[str], quant: str | None) -> None:
    out = tmp_path / "out"
    check(base, out, run(tmp_path, "hf_trainer.py", base, out, *options), quant=quant)


@pytest.mark.full
@pytest.mark.model
def test_the_real_model_learns_too(tmp_path: Path) -> None:
    smollm2 = [sys.executable, str(LOOPS / "smollm2.py"), str(tmp_path / "base")]
    subprocess.run(smollm2, check=True, capture_output=True)
    left = run(tmp_path, "hf_trainer.py", tmp_path / "base", tmp_path / "out", "--steps", "8")
    assert left["losses"][-1] < 0.5 * left["losses"][0]
