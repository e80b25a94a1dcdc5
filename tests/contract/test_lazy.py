"""`import loratune` and `loratune --help` are cheap; what must not know torch does not load it by a detour either."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.contract.house import PACKAGE, REPOSITORY

HEAVY = ("torch", "transformers", "datasets", "accelerate", "matplotlib", "pandas", "pyarrow", "huggingface_hub")


def loaded_after(statement: str) -> set[str]:
    """The heavy packages that a fresh interpreter has loaded after `statement`."""
    code = (
        f"import contextlib, io, json, sys\nwith contextlib.redirect_stdout(io.StringIO()):\n    {statement}\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    done = _python("-c", code)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment)


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import loratune") == set()


def test_adapting_a_model_of_plain_torch_loads_torch_alone() -> None:
    attach = "lt.attach(nn.Sequential(nn.Linear(4, 4)), lt.LoraConfig(r=2, target_modules=['0']))"
    assert loaded_after(f"import loratune as lt; from torch import nn; {attach}") == {"torch"}


def test_listing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import loratune; dir(loratune); loratune.__all__") == set()


def test_help_loads_nothing_heavy() -> None:
    help_ = (
        'from loratune.cli import main\n    try: main(["--help"])\n    except SystemExit as end: assert not end.code'
    )
    assert loaded_after(help_) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["plan", "--help"]])
def test_help_works_as_a_module_without_torch(arguments: list[str]) -> None:
    done = _python("-X", "importtime", "-m", "loratune", *arguments)
    timings = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert done.returncode == 0, [line for line in done.stderr.splitlines() if line not in timings]
    assert "Usage" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in timings}
    assert "loratune.cli" in imported
    assert imported.isdisjoint(HEAVY)


@pytest.mark.parametrize("room", ["errors", "config", "report"])
def test_room_without_torch_does_not_reach_it(room: str) -> None:
    assert (PACKAGE / f"{room}.py").exists() or (PACKAGE / room).is_dir()
    assert "torch" not in loaded_after(f"import loratune.{room}")


def test_guard_sees_a_heavy_import() -> None:
    assert "pyarrow" in loaded_after("import pyarrow")
