"""The files of an adapter: what is written to the byte, and every way in which reading refuses (BEHAVIOUR 30, 32)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loratune as lt
from loratune.adapter import Factors, SavedAdapter, card_of, read_adapter, write_adapter
from loratune.adapter.keys import surplus_keys
from loratune.config.methods import settings_of
from loratune.config.peft_keys import DESCRIPTIVE, NEUTRAL
from loratune.errors import AdapterFileError, AdapterStateError, TargetError
from tests.adapter.cases import CASES, FROM_A_START, base_of, logits, ours

ROOT = Path(__file__).resolve().parents[2]
TENSORS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
ORIGIN = "loratune.json"
KEY = "base_model.model."


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a refused load must leave as it was."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "kinds": {path: type(module) for path, module in model.named_modules()},
        "identities": [id(module) for module in model.modules()] + [id(p) for p in model.parameters()],
        "trains": {name: p.requires_grad for name, p in model.named_parameters()},
        "attributes": sorted(vars(model)),
    }


def same_state(first: dict[str, Any], second: dict[str, Any]) -> bool:
    tensors, others = first["tensors"], second["tensors"]
    return (
        {**first, "tensors": 0} == {**second, "tensors": 0}
        and tensors.keys() == others.keys()
        and all(torch.equal(tensors[name], others[name]) for name in tensors)
    )


# -- writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_saved_loaded_and_saved_again(tmp_path: Path, case: str) -> None:
    model, handle = ours(case)
    handle.save(tmp_path / "first")
    other = base_of(case)
    again = lt.attach(other, tmp_path / "first", name="by-another-name")
    assert torch.equal(logits(other), logits(model))
    again.save(tmp_path / "second")
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")
    if case not in FROM_A_START:  # these are of twice the rank in the file
        assert again.plan().targets == handle.plan().targets


def test_the_folder(tmp_path: Path) -> None:
    model, handle = ours("patterns")
    model.name_or_path = "someone/tiny"
    again = lt.attach(base_of("patterns"), lt.LoraConfig(target_modules=["q_proj"]))
    assert again.names == ("default",)
    handle.save(tmp_path, about="Trained on sums.")
    assert sorted(files_of(tmp_path)) == sorted([CARD, CONFIG, TENSORS, ORIGIN])

    text = (tmp_path / CONFIG).read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    assert config["target_modules"] == ["q_proj", "up_proj", "v_proj"]
    assert (config["peft_type"], config["inference_mode"], config["lora_alpha"]) == ("LORA", True, 8)
    assert isinstance(config["lora_alpha"], int), "peft declares a whole number"
    assert set(config) == {*settings_of("LORA", lt.LoraConfig.names()), *NEUTRAL, *DESCRIPTIVE}

    with safe_open(tmp_path / TENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    expected = {}
    for target in handle.plan().targets:
        expected[f"{KEY}{target.path}.lora_A.weight"] = (target.r, target.in_features)
        expected[f"{KEY}{target.path}.lora_B.weight"] = (target.out_features, target.r)
    assert shapes == expected
    assert shapes[f"{KEY}model.layers.0.self_attn.q_proj.lora_A.weight"] == (2, 32)
    assert shapes[f"{KEY}model.layers.1.self_attn.v_proj.lora_B.weight"] == (16, 7)


def test_the_card(tmp_path: Path) -> None:
    _, handle = ours("plain")
    saved = handle.saved()
    named = SavedAdapter(saved.config, saved.factors, base="someone/tiny")
    _, front, body = card_of(named, about="Trained on sums.").split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "someone/tiny",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:someone/tiny", "lora", "transformers"],
    }
    assert "Rank 4, alpha 8, 4 modules (q_proj, v_proj)." in body
    assert "Trained on sums." in body
    other = SavedAdapter(saved.config.replace(task_type="SEQ_CLS"), saved.factors)
    front = yaml.safe_load(card_of(other).split("---\n", 2)[1])
    assert front == {
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["lora", "transformers"],
    }


ABOUTS = ["Trained on sums.", "", "## Data\n\n- sums\n\nRank 3, alpha 1, and so on.\n\n```python\nimport sums\n```"]


@pytest.mark.parametrize("about", ABOUTS)
def test_what_the_card_says_is_kept_when_it_is_written_again(tmp_path: Path, about: str) -> None:
    _, handle = ours("plain")
    handle.save(tmp_path / "first", about=about)
    assert read_adapter(tmp_path / "first").about == about
    again = lt.attach(base_of("plain"), tmp_path / "first")
    again.save(tmp_path / "second")
    assert files_of(tmp_path / "second") == files_of(tmp_path / "first")
    again.save(tmp_path / "third", about="Other words.")
    assert read_adapter(tmp_path / "third").about == "Other words."


@pytest.mark.parametrize("card", [b"", b"\xff\xfe", b"# Model Card\n\nRank 4, alpha 8.\n\n", None])
def test_a_card_from_elsewhere_says_nothing_of_ours(tmp_path: Path, card: bytes | None) -> None:
    _, handle = ours("plain")
    handle.save(tmp_path, about="Trained on sums.")
    (tmp_path / CARD).unlink()
    if card is not None:
        (tmp_path / CARD).write_bytes(card)
    assert read_adapter(tmp_path).about == ""


def test_gpt2_is_written_as_the_map_it_is(tmp_path: Path) -> None:
    _, handle = ours("gpt2")
    handle.save(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    assert tensors[f"{KEY}transformer.h.0.attn.c_attn.lora_A.weight"].shape == (4, 32)
    assert tensors[f"{KEY}transformer.h.0.attn.c_attn.lora_B.weight"].shape == (96, 4)
    assert json.loads((tmp_path / CONFIG).read_text())["fan_in_fan_out"] is True


def test_all_linear_is_written_out(tmp_path: Path) -> None:
    _, handle = ours("all-linear")
    handle.save(tmp_path)
    names = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert names == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_names_that_would_mean_more_are_written_as_paths(tmp_path: Path) -> None:
    # `proj` in one block only: its short name would also match the head's.
    model = nn.ModuleDict({"block": nn.ModuleDict({"proj": nn.Linear(4, 4)}), "proj": nn.Linear(4, 4)})
    model.get_output_embeddings = lambda: model["proj"]  # type: ignore[assignment]
    handle = lt.attach(model, lt.LoraConfig(target_modules="all-linear"))
    assert handle.saved().config.target_modules == ("block.proj",)
    assert [target.path for target in lt.plan(model, handle.saved().config).targets] == ["block.proj"]


SCRIPT = """
import sys, torch
from torch import nn
import loratune as lt
torch.manual_seed(3)
model = nn.ModuleDict({n: nn.Linear(8, 8) for n in "cab"})
config = lt.LoraConfig(target_modules={"c", "a", "b"}, r=2, exclude_modules={"b"}, rank_pattern={"c": 3})
torch.manual_seed(0)
lt.attach(model, config, name=sys.argv[2]).save(sys.argv[1])
"""


def test_bytes_do_not_depend_on_process_hash_seed_or_name(tmp_path: Path) -> None:
    for number, (seed, name) in enumerate((("0", "default"), ("4321", "other"))):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT / "src")}
        subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / str(number)), name], check=True, env=environment)
    assert files_of(tmp_path / "0") == files_of(tmp_path / "1")


def test_a_dtype_is_kept_and_aliases_are_copied(tmp_path: Path) -> None:
    A = torch.randn(4, 8, dtype=torch.bfloat16)
    config = lt.LoraConfig(r=2, target_modules=("a", "b"))
    factors = {"a": Factors(A[:2], A.T[:, :2]), "b": Factors(A[2:], A.T[:, 2:])}
    write_adapter(tmp_path, SavedAdapter(config, factors), card="x")
    read = read_adapter(tmp_path).factors
    assert all(torch.equal(factors[p].A, read[p].A) and torch.equal(factors[p].B, read[p].B) for p in factors)
    assert read["a"][0].dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nothing_is_written_that_is_not_finite(tmp_path: Path, bad: float) -> None:
    _, handle = ours("plain")
    handle.save(tmp_path)
    before = files_of(tmp_path)
    paths = list(handle.factors())
    with torch.no_grad():
        handle.factors()[paths[0]].A[0, 0] = bad
        handle.factors()[paths[2]].B[1, 1] = bad
    with pytest.raises(AdapterFileError) as caught:
        handle.save(tmp_path)
    assert [line.split(":")[0] for line in caught.value.problems] == [paths[0], paths[2]]
    assert files_of(tmp_path) == before


def test_which_adapter_is_meant(tmp_path: Path) -> None:
    _, handle = ours("plain")
    handle.add(lt.LoraConfig(target_modules=["q_proj"]), "second")
    handle.save(tmp_path)  # the one active one
    assert len(read_adapter(tmp_path).factors) == 4
    handle.activate("default", "second")
    with pytest.raises(AdapterStateError, match="several"):
        handle.save(tmp_path)
    handle.save(tmp_path, "second")
    assert len(read_adapter(tmp_path).factors) == 2


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    ours("plain")[1].save(folder)
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **values}))


Q0 = f"{KEY}model.layers.0.self_attn.q_proj.lora_A.weight"
V1 = f"{KEY}model.layers.1.self_attn.v_proj.lora_B.weight"


def refused(folder: Path, *messages: str, kind: type[Exception] = AdapterFileError) -> None:
    """`attach` and `load` both refuse with one problem for each message, and the model is what it was."""
    model = base_of("plain")
    before = state_of(model)
    with pytest.raises(kind) as caught:
        lt.attach(model, folder)
    problems = caught.value.problems  # type: ignore[attr-defined]
    assert len(problems) == len(messages), problems
    for message in messages:
        assert any(message in problem for problem in problems), (message, problems)
    assert same_state(state_of(model), before)

    model, handle = ours("plain")
    before, kept = state_of(model), logits(model)
    with pytest.raises(kind):
        handle.load(folder, "second")
    assert same_state(state_of(model), before)
    assert torch.equal(logits(model), kept)
    assert handle.names == handle.active == ("default",)


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


def test_the_good_one_loads(folder: Path) -> None:
    lt.attach(base_of("plain"), folder)


def test_every_wrong_tensor_is_listed(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[Q0], tensors[Q0.replace("lora_A", "lora_B")]
        tensors[V1] = torch.zeros(17, 4)
        tensors[f"{KEY}model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)
        tensors[f"{KEY}model.layers.7.self_attn.q_proj.lora_B.weight"] = torch.zeros(32, 4)

    edit_tensors(folder, change)
    refused(
        folder,
        "no tensors for model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj: A (4, 32) and B (17, 4), expected (4, 32) and (16, 4)",
        "tensors for model.layers.7.self_attn.q_proj, which this model lacks",
    )


def test_every_odd_tensor_is_listed(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[Q0]
        tensors[V1][0, 0] = torch.nan
        tensors["lm_head.weight"] = torch.zeros(3)
        tensors[f"{KEY}a.lora_embedding_A"] = torch.zeros(3)
        tensors[f"{KEY}a.lora_embedding_C"] = torch.zeros(3)
        tensors[f"{KEY}b.lora_A.weight"] = torch.zeros(3)
        tensors[f"{KEY}b.lora_B.weight"] = torch.zeros(3, 3, dtype=torch.int64)

    edit_tensors(folder, change)
    refused(
        folder,
        "model.layers.0.self_attn.q_proj.lora_A.weight is missing",
        f"{V1!r} holds NaN or infinity",
        "unexpected tensor 'lm_head.weight'",
        "unexpected tensor 'base_model.model.a.lora_embedding_C'",
        "'base_model.model.a.lora_embedding_A' is (3,), not a matrix",
        "'base_model.model.b.lora_A.weight' is (3,), not a matrix",
        "'base_model.model.b.lora_B.weight' is torch.int64, not fp32, fp64, bf16 or fp16",
    )


def test_factors_that_share_no_rank(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({V1: torch.zeros(16, 3)}))
    refused(folder, "A (4, 32) and B (16, 3) do not share a rank")


def test_another_rank_in_the_config(folder: Path) -> None:
    edit_config(folder, r=5)
    refused(folder, *(["expected (5, 32)"] * 4))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.9999])
def test_a_truncated_file(folder: Path, share: float) -> None:
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[: int(share * len(content))])
    refused(folder, "is damaged or not a safetensors file")


def test_a_file_of_something_else(folder: Path) -> None:
    (folder / TENSORS).write_bytes(b"PK\x03\x04" + bytes(range(256)) * 40)
    refused(folder, "is damaged or not a safetensors file")
    save_file({}, folder / TENSORS)
    refused(folder, "holds no low-rank tensors")


def test_pickle_is_never_opened(folder: Path) -> None:
    (folder / TENSORS).unlink()
    refused(folder, f"holds no adapter: {TENSORS} is missing")

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(folder / "opened"),)

    torch.save(Trap(), folder / "adapter_model.bin")
    refused(folder, "is a pickle, which can run code")
    assert not (folder / "opened").exists()


def test_no_folder_and_no_config(folder: Path) -> None:
    refused(folder / "nowhere", "no such folder")
    (folder / CONFIG).unlink()
    refused(folder, f"{CONFIG} is missing")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"[]", "holds no JSON object"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"{}", "peft_type is None"),
    ],
)
def test_a_config_that_is_none(folder: Path, content: bytes, message: str) -> None:
    (folder / CONFIG).write_bytes(content)
    refused(folder, message)


def test_another_method_of_peft(folder: Path) -> None:
    edit_config(folder, peft_type="LOHA")
    refused(folder, "peft_type is 'LOHA', only 'LORA', 'VERA', 'IA3' can be read")


def test_all_that_a_config_asks_in_vain_is_listed(folder: Path) -> None:
    edit_config(folder, use_qalora=True, bias="some", target_parameters=[3], r=-1, init_lora_weights="pisa")
    refused(folder, "use_qalora=True", "bias='some'", "target_parameters=[3]", "r=-1", "init_lora_weights='pisa'")


def test_a_config_whose_targets_the_model_lacks(folder: Path) -> None:
    edit_config(folder, target_modules=["q_proj", "c_attn", "v_prj"])
    refused(folder, "'c_attn' matches no module", "did you mean 'v_proj'?", kind=TargetError)


def test_only_the_type_is_required(folder: Path) -> None:
    config = {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"], "r": 4}
    (folder / CONFIG).write_text(json.dumps(config))
    handle = lt.attach(base_of("plain"), folder)
    assert handle.config().lora_alpha == 8, "peft's default, since peft would read it so"
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    assert read_adapter(folder).config == lt.LoraConfig(lora_alpha=8)


def test_unknown_keys_are_kept_and_said(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, from_the_future={"x": [1]}, revision="main", base_model_name_or_path="someone/tiny")
    handle = lt.attach(base_of("plain"), folder)
    assert any("unknown key 'from_the_future'" in note for note in handle.plan().notes)
    handle.save(tmp_path / "again")
    again = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert again["from_the_future"] == {"x": [1]}
    assert (again["revision"], again["base_model_name_or_path"]) == ("main", "someone/tiny")


def test_a_killed_write_is_finished_before_reading(good: Path, folder: Path) -> None:
    shutil.copytree(good, folder / ".committed")
    for name in (CONFIG, TENSORS):
        (folder / name).write_bytes(b"old")
    lt.attach(base_of("plain"), folder)
    assert files_of(folder) == files_of(good)


def test_only_a_copy_of_what_is_there_is_surplus() -> None:
    """peft writes modules that train whole twice or three times in some releases; a lone one says something."""
    prefix, weight = "base_model.model.score.", torch.ones(2, 3)
    original, inner = f"{prefix}original_module.weight", f"{prefix}modules_to_save.weight"
    assert surplus_keys({original: weight}) == ()
    assert surplus_keys({inner: weight}) == ()
    assert surplus_keys({original: weight + 1, inner: weight, f"{prefix}weight": weight}) == (original, inner)
    assert surplus_keys({inner: weight + 1, f"{prefix}weight": weight}) == ()
