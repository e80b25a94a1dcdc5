"""`combine`, `diff` and `inspect` on folders and values, and the folder that `combine` writes."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import loratune as lt
from loratune.adapter import Origin, SavedAdapter, card_of, read_adapter, write_adapter
from loratune.errors import AdapterFileError, ConfigError, RunFolderError
from loratune.run.show import show
from tests.adapter.values import adapter, dense_of
from tests.models import VOCABULARY, tiny
from tests.oracle import algebra

Folders = tuple[str, str]

# Modules of the tiny model: r, in, out.
LEFT = {"model.layers.0.self_attn.q_proj": (4, 32, 32), "model.layers.1.mlp.down_proj": (4, 64, 32)}
RIGHT = {"model.layers.0.self_attn.q_proj": (2, 32, 32), "model.layers.1.self_attn.v_proj": (3, 32, 16)}


@pytest.fixture
def values() -> tuple[SavedAdapter, SavedAdapter]:
    left = adapter(LEFT, alpha=2, alpha_pattern={"down_proj": 0.5})
    right = adapter(RIGHT, alpha=1, rslora=True, seed=1, rank_pattern={"v_proj": 3})
    origin = Origin(base="f00d", tokenizer="beef")
    return replace(left, base="a/base", origin=origin), replace(right, base="a/base", origin=origin)


@pytest.fixture
def folders(values: tuple[SavedAdapter, SavedAdapter], tmp_path: Path) -> Folders:
    for name, value in zip(("left", "right"), values, strict=True):
        write_adapter(tmp_path / name, value, card=card_of(value))
    return str(tmp_path / "left"), str(tmp_path / "right")


def test_folder_holds_the_sum(folders: Folders, values: tuple[SavedAdapter, SavedAdapter], tmp_path: Path) -> None:
    out = tmp_path / "sum"
    made = lt.combine(folders, [0.75, -0.5], out=out)
    read = read_adapter(out)
    left, right, found = (dense_of(each) for each in (*values, read))
    shared = "model.layers.0.self_attn.q_proj"
    assert np.allclose(found[shared], algebra.weighted_sum([left[shared], right[shared]], [0.75, -0.5]), atol=1e-5)
    assert np.allclose(found["model.layers.1.mlp.down_proj"], 0.75 * left["model.layers.1.mlp.down_proj"], atol=1e-5)
    assert (read.base, read.origin) == ("a/base", Origin(base="f00d", tokenizer="beef"))
    assert all(torch.equal(read.factors[path].B, factors.B) for path, factors in made.adapter.factors.items())
    card = (out / "README.md").read_text()
    assert "Combined by concat from 0.75 × `left`, -0.5 × `right`." in card
    assert str(tmp_path) not in card


def test_the_card_says_what_is_lost(folders: Folders, tmp_path: Path) -> None:
    made = lt.combine(folders, method="svd", rank=2, out=tmp_path / "svd")
    assert made.weights == (1.0, 1.0)
    assert f"which misses {made.error:.2%} of what was asked for" in (tmp_path / "svd" / "README.md").read_text()


def test_same_call_same_bytes(folders: Folders, tmp_path: Path) -> None:
    for name in ("one", "two"):
        lt.combine(folders, [1, 1], method="dare", density=0.5, seed=4, out=tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors", "loratune.json"]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


def test_values_and_paths_mix_and_nothing_is_written_without_out(
    folders: Folders, values: tuple[SavedAdapter, SavedAdapter], tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    made = lt.combine([Path(folders[0]), values[1]], [1, 2])
    assert all(np.array_equal(x, y) for x, y in zip(
        dense_of(made.adapter).values(), dense_of(lt.combine(values, [1, 2]).adapter).values(), strict=True
    ))  # fmt: skip
    assert lt.diff(folders[0], values[0]).total.distance == 0.0
    assert lt.inspect(values[0]) == lt.inspect(folders[0])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", ["thesis.tex", "adapter_config.json"])
def test_existing_folder_is_refused_before_anything_is_read(content: str, folders: Folders, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / content).write_text("work")
    with pytest.raises(RunFolderError, match="exists already"):
        lt.combine([folders[0], tmp_path / "nowhere"], [1, 1], out=out)
    assert [path.name for path in out.iterdir()] == [content]
    (tmp_path / "file").write_text("work")
    with pytest.raises(RunFolderError, match="exists already"):
        lt.combine(folders, [1, 1], out=tmp_path / "file")
    (tmp_path / "empty").mkdir()
    lt.combine(folders, [1, 1], out=tmp_path / "empty")


def test_every_bad_folder_is_named_and_nothing_written(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "hollow").mkdir()
    with pytest.raises(AdapterFileError) as caught:
        lt.combine([tmp_path / "nowhere", folders[0], tmp_path / "hollow"], [1, 1, 1], out=tmp_path / "out")
    first, second = caught.value.problems
    assert "nowhere" in first
    assert "hollow" in second
    with pytest.raises(AdapterFileError, match="nowhere"):
        lt.diff(folders[0], tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="3 weights for 2 adapters"):
        lt.combine(folders, [1, 1, 1], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refusals_name_the_folder(folders: Folders, tmp_path: Path) -> None:
    strange = replace(read_adapter(Path(folders[1])), origin=Origin(base="0dd"))
    write_adapter(tmp_path / "strange", strange, card="")
    with pytest.raises(AdapterFileError, match=f"{folders[0]} on f00d, {tmp_path / 'strange'} on 0dd"):
        lt.combine([folders[0], tmp_path / "strange"], [1, 1])


def test_show_uses_the_patterns(folders: Folders, values: tuple[SavedAdapter, SavedAdapter]) -> None:
    for folder, value in zip(folders, values, strict=True):
        for layer in show(folder)["layers"]:
            assert layer["norm"] == pytest.approx(algebra.norm(dense_of(value)[layer["path"]]), rel=1e-9)
            assert layer["scale"] == value.scale(layer["path"])
            assert layer["largest"] == layer["singular_values"][0]


def test_show_names_damage(values: tuple[SavedAdapter, SavedAdapter], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_adapter(tmp_path, values[0], card="")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    found = show(str(tmp_path))
    assert found["non_finite"] == ["model.layers.0.self_attn.q_proj: A"]
    assert found["norm"] is None
    broken, sound = found["layers"]
    assert broken["norm"] is broken["effective_rank"] is broken["singular_values"] is None
    assert sound["norm"] > 0


# -- with a model ----------------------------------------------------------------------------------------------------

IDS = torch.arange(2 * 7).view(2, 7) * 17 % VOCABULARY


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def with_weighted_sum(values: tuple[SavedAdapter, SavedAdapter], weights: tuple[float, float]) -> torch.nn.Module:
    """The tiny model with Σ w ΔW, worked out densely, in its weights."""
    model: torch.nn.Module = tiny()
    for value, weight in zip(values, weights, strict=True):
        for path, matrix in dense_of(value).items():
            layer: Any = model.get_submodule(path)
            layer.weight.data = (layer.weight.double() + weight * torch.from_numpy(matrix)).float()
    return model


def small(values: tuple[SavedAdapter, SavedAdapter]) -> tuple[SavedAdapter, SavedAdapter]:
    """Of a size that moves the logits without overwhelming the base."""
    left, right = (
        replace(
            each, factors={path: f._replace(A=f.A * 0.1, B=f.B * 0.3) for path, f in each.factors.items()}
        )
        for each in values
    )  # fmt: skip
    return left, right


WEIGHTS = (0.75, -1.25)


def close_to(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    assert float((wanted - logits(tiny())).norm() / wanted.norm()) > 0.05, "the adapters must matter"
    return float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_peft_reads_the_sum(values: tuple[SavedAdapter, SavedAdapter], tmp_path: Path) -> None:
    import peft

    values = small(values)
    lt.combine(values, WEIGHTS, out=tmp_path / "sum")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft's word for a missing key
        loaded = peft.PeftModel.from_pretrained(tiny(), tmp_path / "sum")
    assert close_to(logits(loaded.eval()), logits(with_weighted_sum(values, WEIGHTS)))


def test_attach_reads_the_sum(values: tuple[SavedAdapter, SavedAdapter], tmp_path: Path) -> None:
    values = small(values)
    lt.combine([replace(each, origin=Origin()) for each in values], WEIGHTS, out=tmp_path / "sum")
    model = tiny()
    lt.attach(model, tmp_path / "sum")
    assert close_to(logits(model), logits(with_weighted_sum(values, WEIGHTS)))


@pytest.mark.parametrize("adapters", [5, "folder", None])
def test_what_is_no_list_of_adapters(adapters: Any) -> None:
    with pytest.raises(ConfigError, match="is no list"):
        lt.combine(adapters)


def test_what_names_no_adapter() -> None:
    with pytest.raises(AdapterFileError, match="a int names no adapter"):
        lt.diff(5, 6)  # type: ignore[arg-type]
