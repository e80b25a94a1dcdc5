"""The table of rooms holds, without exceptions; and the checker that says so finds planted breaches."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.contract.house import HOUSE, PACKAGE, REPOSITORY
from tests.contract.imports import read_package, violations


def test_every_import_follows_the_table() -> None:
    found = violations(PACKAGE, HOUSE)
    assert not found, "\n" + "\n".join(found)


def test_third_parties_are_declared() -> None:
    """What src/ imports stands in pyproject.toml itself, not in some dependency's dependencies."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + [line for extra in ("quant", "serve", "eval") for line in extras[extra]]
    # Torch's CUDA wheels pin triton, and other builds of torch have no use for it. What imports it is imported
    # only where it is found (tests/model/test_triton_blocks.py); its range stands with what the tests need.
    lines += [line for line in extras["dev"] if line.startswith("triton>")]
    declared = {_normal(re.split(r"[\s<>=!~;\[]", line, maxsplit=1)[0]) for line in lines}
    owners = importlib.metadata.packages_distributions()
    found = []
    for module in read_package(PACKAGE).values():
        for item in module.imports:
            party = item.target.partition(".")[0]
            if party in sys.stdlib_module_names or party == HOUSE.package or item.scope == "typing":
                continue
            if not declared & {_normal(name) for name in (party, *owners.get(party, ()))}:
                found.append(f"{module.name}:{item.line} imports {party}, which pyproject.toml does not name")
    assert not found, "\n" + "\n".join(found)


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def build(folder: Path, sources: Mapping[str, str]) -> Path:
    """A package called loratune with these files."""
    package = folder / "loratune"
    for name, source in {"__init__.py": "", **sources}.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return package


ALLOWED = {
    "errors.py": "import difflib\n",
    "config/__init__.py": "from loratune.errors import ConfigError\nimport pydantic\n",
    "lora/layer.py": "import torch\nfrom .scale import scale\nfrom ..errors import LoratuneError\n",
    "lora/scale.py": "from loratune.config import LoraConfig\n",
    "data/render/chat.py": "import transformers\n",
    "data/read.py": "import datasets\n",
    "cli/__init__.py": "def main():\n    import torch\n    from loratune.run import train\n",
    "__main__.py": "from loratune.cli import main\n",
    "__init__.py": "import importlib\ndef __getattr__(name):\n    return importlib.import_module(TABLE[name])\n",
    "run/__init__.py": "from loratune.training import loop\n",
    "training/__init__.py": "import accelerate\n",
}


def test_allowed_imports_pass(tmp_path: Path) -> None:
    assert violations(build(tmp_path, ALLOWED), HOUSE) == []


PLANTED = {
    "a room below": ({"lora/x.py": "from loratune.adapt import attach\n"}, "stands below"),
    "the same line": ({"lora/x.py": "import loratune.quant.dense\n"}, "on the same line"),
    "the same line, relatively": ({"lora/x.py": "from ..quant import dense\n"}, "on the same line"),
    "inside a function": ({"adapt/__init__.py": "def f():\n    from loratune.run import train\n"}, "stands below"),
    "inside an async method": (
        {"adapt/__init__.py": "class C:\n  async def f(self):\n    import loratune.run\n"},
        "stands below",
    ),
    "inside try": (
        {"adapt/__init__.py": "try:\n    import loratune.run\nexcept ImportError:\n    pass\n"},
        "stands below",
    ),
    "for types only": (
        {"loss.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from loratune.training import Loop\n"},
        "stands below",
    ),
    "by a written name": ({"data/x.py": "import importlib\nimportlib.import_module('loratune.cli')\n"}, "stands below"),
    "by half a name": (
        {"data/x.py": "from importlib import import_module\nimport_module(f'loratune.cli.{x}')\n"},
        "stands below",
    ),
    "by a hidden name": ({"data/x.py": "import importlib\nimportlib.import_module(name)\n"}, "not written there"),
    "the front door": ({"cli/__init__.py": "import loratune\n"}, "imports loratune itself"),
    "the front door, relatively": ({"cli/__init__.py": "from .. import attach\n"}, "imports loratune itself"),
    "no room": ({"utils.py": ""}, "in no room"),
    "from no room": ({"cli/__init__.py": "from loratune.tools import x\n"}, "in no room"),
    "a cycle in a room": (
        {"training/a.py": "from loratune.training import b\n", "training/b.py": "def f():\n    from .a import x\n"},
        "cycle: loratune.training.a → loratune.training.b → loratune.training.a",
    ),
    "a cycle through a room's front": (
        {
            "training/__init__.py": "from loratune.training.a import x\n",
            "training/a.py": "from loratune.training import y\n",
        },
        "cycle: loratune.training → loratune.training.a → loratune.training",
    ),
    "a module that imports itself": ({"loss.py": "import loratune.loss\n"}, "cycle: loratune.loss → loratune.loss"),
    "transformers": ({"run/__init__.py": "from transformers import AutoConfig\n"}, "imports transformers, which only"),
    "transformers beside data.render": ({"data/render_all.py": "import transformers\n"}, "imports transformers"),
    "datasets in data, not in data.read": ({"data/pack.py": "import datasets.features\n"}, "imports datasets"),
    "accelerate": ({"model/__init__.py": "import accelerate\n"}, "imports accelerate"),
    "bitsandbytes": ({"training/__init__.py": "def f():\n    import bitsandbytes\n"}, "imports bitsandbytes"),
    "fastapi": ({"cli/__init__.py": "def f():\n    from fastapi import FastAPI\n"}, "imports fastapi"),
    "peft": ({"compat/peft.py": "import peft\n"}, "imports peft, which only tests may touch"),
    "more than torch in lora": ({"lora/x.py": "import numpy\n"}, "lora may import only torch"),
    "torch in config": ({"config/__init__.py": "def f():\n    import torch\n"}, "config never does"),
    "torch in report": ({"report/__init__.py": "from torch.nn import Module\n"}, "report never does"),
    "torch in the command": ({"cli/__init__.py": "import torch\n"}, "inside functions only"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_checker_finds_a_planted_breach(tmp_path: Path, planted: str) -> None:
    sources, reason = PLANTED[planted]
    found = violations(build(tmp_path, sources), HOUSE)
    assert len(found) == 1, found
    assert reason in found[0]


def test_breach_names_module_and_line(tmp_path: Path) -> None:
    (breach,) = violations(build(tmp_path, {"lora/x.py": "\n\nimport loratune.run\n"}), HOUSE)
    assert breach.startswith("loratune.lora.x:3 ")
