"""`show`, `diff`, `combine` and `export` on the command line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from loratune.adapter import Factors, card_of, combine, read_adapter, write_adapter
from tests.adapter.values import adapter
from tests.cli.conftest import Cli

MODULES = {"layers.2.q_proj": (4, 12, 10), "layers.10.q_proj": (4, 12, 10)}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    for seed, name in enumerate(("left", "right")):
        made = adapter(MODULES, alpha=8 * (seed + 1), seed=seed)
        write_adapter(tmp_path / name, made, card=card_of(made))
    return tmp_path / "left", tmp_path / "right"


def test_combine(cli: Cli, pair: tuple[Path, Path], tmp_path: Path) -> None:
    said = cli("combine", *pair, "--weights", "0.7,0.3", "--out", tmp_path / "sum")
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert lines[0] == f"0.7 × {pair[0]} + 0.3 × {pair[1]}"
    assert lines[-2] == "concat · 352 parameters · error 0.00%"
    assert lines[-1] == str(tmp_path / "sum")
    wanted = combine([read_adapter(folder) for folder in pair], [0.7, 0.3]).adapter
    found = read_adapter(tmp_path / "sum")
    assert all(torch.equal(found.factors[path].B, factors.B) for path, factors in wanted.factors.items())


@pytest.mark.parametrize("words", [("--weights=-1,0.5",), ("--weights", "-1,0.5")])
def test_combine_with_negative_weights_as_json(
    words: tuple[str, ...], cli: Cli, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    said = cli("combine", *pair, *words, "--method", "svd", "--rank", 3, "--out", tmp_path / "out", "--json")
    assert said.code == 0
    found = said.json
    assert found["adapters"] == [{"path": str(pair[0]), "weight": -1.0}, {"path": str(pair[1]), "weight": 0.5}]
    assert (found["out"], found["method"], found["parameters"]) == (str(tmp_path / "out"), "svd", 2 * 3 * 22)
    wanted = combine([read_adapter(folder) for folder in pair], [-1, 0.5], method="svd", rank=3)
    assert found["error"] == wanted.error > 0.1
    assert found["modules"] == [{"path": path, "r": 3, "error": error} for path, error in wanted.errors.items()]


def test_combine_by_ties_and_dare(cli: Cli, pair: tuple[Path, Path], tmp_path: Path) -> None:
    for method in ("ties", "dare"):
        words = ("--method", method, "--density", 0.5, "--seed", 3, "--json")
        found = cli("combine", *pair, *words, "--out", tmp_path / method).json
        wanted = combine([read_adapter(folder) for folder in pair], [1, 1], method=method, density=0.5, seed=3)
        assert found["error"] == wanted.error
        assert torch.equal(
            read_adapter(tmp_path / method).factors["layers.2.q_proj"].A, wanted.adapter.factors["layers.2.q_proj"].A
        )


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--method", "linear"), 2, "not a weighted sum of the updates"),
        (("--method", "conact"), 2, "did you mean 'concat'?"),
        (("--weights", "1"), 2, "1 weights for 2 adapters"),
        (("--weights", "1,a"), 2, "--weights 1,a: not a list of numbers"),
        (("--weights", "1,nan"), 2, "weight 2 is nan"),
        (("--rank", "0", "--method", "svd"), 2, "rank=0"),
        (("--density", "2", "--method", "dare"), 2, "density=2.0 is not in (0, 1]"),
        (("--methd", "svd"), 2, "--method"),
    ],
)
def test_combine_refuses(
    words: tuple[str, ...], code: int, message: str, cli: Cli, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    said = cli("combine", *pair, *words, "--out", tmp_path / "out")
    assert (said.code, said.out) == (code, "")
    assert message in said.err
    assert not (tmp_path / "out").exists()


def test_combine_refuses_folders(cli: Cli, pair: tuple[Path, Path], tmp_path: Path) -> None:
    said = cli("combine", pair[0], tmp_path / "nowhere", "--out", tmp_path / "out")
    assert (said.code, said.out) == (1, "")
    assert "nowhere" in said.err
    other = adapter({"layers.2.q_proj": (4, 7, 10)})
    write_adapter(tmp_path / "other", other, card="")
    said = cli("combine", pair[0], tmp_path / "other", "--out", tmp_path / "out", "--json")
    assert said.code == 1
    assert said.json["error"]["kind"] == "AdapterFileError"
    assert not (tmp_path / "out").exists()
    said = cli("combine", *pair, "--out", pair[0])
    assert said.code == 1
    assert "exists already" in said.err
    assert cli("combine", *pair).code == 2, "--out is needed"


def test_diff(cli: Cli, pair: tuple[Path, Path]) -> None:
    said = cli("diff", *pair)
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["layer", "layers.2.q_proj", "layers.10.q_proj", "all"]
    assert "  lora_alpha: 8.0 / 16.0" in lines
    found = cli("diff", *pair, "--json").json
    assert (found["a"], found["b"]) == (str(pair[0]), str(pair[1]))
    assert [module["path"] for module in found["modules"]] == list(MODULES)
    assert 0 < found["modules"][0]["input_overlap"] < 1
    assert found["settings"] == {"lora_alpha": [8.0, 16.0]}
    assert cli("diff", pair[0], pair[0], "--json").json["total"]["distance"] == 0.0


def test_diff_of_untrained_and_other_modules(cli: Cli, pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = adapter({"layers.2.q_proj": (2, 12, 10), "other": (2, 3, 3)})
    zero = {path: Factors(f.A, torch.zeros_like(f.B)) for path, f in made.factors.items()}
    write_adapter(tmp_path / "zero", replace(made, factors=zero), card="")
    said = cli("diff", pair[0], tmp_path / "zero")
    assert said.code == 0
    assert "–" in said.out
    assert "only in a:\n  layers.10.q_proj\n" in said.out
    assert "only in b:\n  other\n" in said.out


def test_diff_refuses(cli: Cli, pair: tuple[Path, Path], tmp_path: Path) -> None:
    said = cli("diff", pair[0], tmp_path / "nowhere")
    assert (said.code, said.out) == (1, "")
    assert "nowhere" in said.err


def test_show(cli: Cli, pair: tuple[Path, Path]) -> None:
    said = cli("show", pair[0])
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert "r = 4" in lines
    assert "176 parameters · " in said.out
    assert [line.split()[0] for line in lines[-3:]] == ["layer", *MODULES]
    assert "megatron" not in said.out, "what peft writes in every file says nothing about this one"
    found = cli("show", pair[0], "--json").json
    assert [layer["dead"] for layer in found["layers"]] == [0, 0]
    assert len(found["layers"][0]["singular_values"]) == 4


def test_show_names_what_is_broken_or_unused(cli: Cli, pair: tuple[Path, Path]) -> None:
    path = pair[0] / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.layers.2.q_proj.lora_A.weight"][1] = 0
    tensors["base_model.model.layers.10.q_proj.lora_B.weight"][1, 1] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    said = cli("show", pair[0])
    assert said.code == 0
    assert "components with a zero row of A or column of B:\n  layers.2.q_proj (1)\n" in said.out
    assert "✗ NaN or infinity in:\n  layers.10.q_proj: B\n" in said.out
    assert "nan" not in said.out.replace("NaN", "")
    assert "NaN" not in cli("show", pair[0], "--json").out


@pytest.mark.parametrize("command", ["show", "diff", "combine"])
def test_help_does_not_load_torch(command: str) -> None:
    code = (
        "import sys\nfrom loratune.cli import main\n"
        f"assert main([{command!r}, '--help']) == 0\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_export_of_a_whole_model(cli: Cli, base: str, tmp_path: Path) -> None:
    found = cli("export", base, "--to", "gguf", "--merged", "--dtype", "bf16", "--out", tmp_path / "out", "--json").json
    assert found["out"] == str(tmp_path / "out" / "model.gguf")
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(found["out"]).tensors} == {"BF16", "F32"}
    said = cli("export", base, "--to", "gguf", "--merged", "--out", tmp_path / "out")
    assert said.code == 1
    assert "exists already" in said.err
    said = cli("export", base, "--to", "vllm", "--merged", "--out", tmp_path / "other")
    assert (said.code, said.out) == (2, "")
