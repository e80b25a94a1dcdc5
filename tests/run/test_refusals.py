"""What a run refuses: the kind of error, what it says, and that nothing was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratune.errors import ConfigError, DataError, LoratuneError, MissingExtraError, ModelError, TargetError
from tests.models import additions, saved, tiny, write_jsonl
from tests.tiny import tiny_tokenizer

Quick = Callable[..., Any]


def refused(quick: Quick, out: Path, kind: type[LoratuneError], **changes: Any) -> str:
    """The refusal's text, after seeing that it left no folder."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(kind) as caught:
        quick(out, **changes)
    assert sorted(out.parent.rglob("*")) == before
    assert type(caught.value) is kind
    return str(caught.value)


def test_unknown_setting(quick: Quick, tmp_path: Path) -> None:
    text = refused(quick, tmp_path / "run", ConfigError, epoch=3, batchsize=2)
    assert "unknown setting 'epoch'; did you mean 'epochs'?" in text
    assert "unknown setting 'batchsize'; did you mean 'batch_size'?" in text


def test_settings_out_of_range(quick: Quick, tmp_path: Path) -> None:
    text = refused(quick, tmp_path / "run", ConfigError, lr=-1.0, schedule="cosin", batch_size=0)
    for name in ("lr=-1.0", "schedule='cosin'", "batch_size=0"):
        assert name in text


def test_unknown_target(quick: Quick, tmp_path: Path) -> None:
    text = refused(quick, tmp_path / "run", TargetError, target_modules=("q_prj", "v_proj"))
    assert "'q_prj' matches no module; did you mean 'q_proj'?" in text
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert name in text.split("hint:")[1]


def test_missing_and_empty_file(quick: Quick, tmp_path: Path) -> None:
    assert "no such file" in refused(quick, tmp_path / "run", DataError, data=str(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_text("")
    assert "the file is empty" in refused(quick, tmp_path / "run", DataError, data=str(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_text("\n\n")
    assert "no rows" in refused(quick, tmp_path / "run", DataError, data=str(tmp_path / "rows.jsonl"))
    assert "no rows" in refused(quick, tmp_path / "run", DataError, data=[])


def test_rows_without_an_answer(quick: Quick, tmp_path: Path) -> None:
    rows = additions(6)
    rows[1] = {"prompt": "1 + 1 ="}
    rows[4] = {"prompt": "2 + 2 =", "completion": ""}
    text = refused(quick, tmp_path / "run", DataError, data=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert "rows.jsonl:2" in text
    assert "rows.jsonl:5" in text
    chat = [{"messages": [{"role": "user", "content": "Hello?"}]}]
    text = refused(quick, tmp_path / "run", DataError, data=str(write_jsonl(tmp_path / "chat.jsonl", chat)))
    assert "chat.jsonl:1" in text


def test_answer_cut_off(quick: Quick, tmp_path: Path) -> None:
    rows = [*additions(3), {"prompt": "Count!", "completion": " ".join(map(str, range(40)))}]
    data = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    text = refused(quick, tmp_path / "run", DataError, data=data, max_length=30, overlong="truncate")
    assert "rows.jsonl:4: answer cut off by truncation" in text
    text = refused(quick, tmp_path / "run", DataError, data=data, max_length=30)
    assert "rows.jsonl:4" in text
    assert "longer than 30" in text


def test_longer_than_the_context(quick: Quick, tmp_path: Path) -> None:
    assert "context of 128 tokens" in refused(quick, tmp_path / "run", ConfigError, max_length=129)


def test_nan_in_the_weights(quick: Quick, tmp_path: Path) -> None:
    folder = saved(tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = refused(quick, tmp_path / "run", ModelError, model=str(folder))
    assert "model.layers.1.mlp.up_proj.weight: holds NaN" in text
    assert "model.norm.weight" in text
    assert "down_proj" not in text


def test_nan_in_a_loaded_model(quick: Quick, tmp_path: Path) -> None:
    model = tiny()
    model.lm_head.weight[0, 0] = float("nan")
    text = refused(quick, tmp_path / "run", ModelError, model=model, tokenizer=tiny_tokenizer())
    assert "lm_head.weight" in text


def test_missing_tracker(quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratune.training.trackers.find_spec", lambda _: None)
    text = refused(quick, tmp_path / "run", MissingExtraError, log_with=("wandb",), model="never/read")
    assert "wandb is not installed" in text
    assert "pip install wandb" in text
    assert "'mlflow'" in refused(quick, tmp_path / "run", ConfigError, log_with="mlfow", model="never/read")


def test_missing_model(quick: Quick, tmp_path: Path) -> None:
    assert "no such model folder" in refused(quick, tmp_path / "run", ModelError, model=str(tmp_path / "nowhere"))
    assert "a dict is no model" in refused(quick, tmp_path / "run", ModelError, model={})


def test_adapter_folder_as_a_model(quick: Quick, tmp_path: Path, finished: Path) -> None:
    assert "it holds an adapter: name its base" in refused(quick, tmp_path / "run", ModelError, model=str(finished))


def test_packing_a_model_that_cannot(quick: Quick, tmp_path: Path) -> None:
    model = tiny("gemma2")
    text = refused(quick, tmp_path / "run", ConfigError, model=model, tokenizer=tiny_tokenizer(), pack=True)
    assert "cannot take packed rows" in text


def test_early_stop_without_validation(quick: Quick, tmp_path: Path) -> None:
    assert "early_stop needs held-out rows" in refused(quick, tmp_path / "run", ConfigError, early_stop=2, val=0)


def test_sgd_needs_a_rate(quick: Quick, tmp_path: Path) -> None:
    assert "no rate is known for sgd" in refused(quick, tmp_path / "run", ConfigError, optimizer="sgd", lr=None)


def test_device_that_is_not_there(quick: Quick, tmp_path: Path) -> None:
    refused(quick, tmp_path / "run", ConfigError, device="cuda:99")
    refused(quick, tmp_path / "run", ConfigError, device="toaster")


def test_val_that_leaves_nothing(quick: Quick, tmp_path: Path) -> None:
    assert "none would be left" in refused(quick, tmp_path / "run", DataError, val=24)


def test_refused_loaded_model_is_untouched(quick: Quick, tmp_path: Path) -> None:
    model = tiny().requires_grad_(True).train()
    attention = model.config._attn_implementation
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refused(quick, tmp_path / "run", TargetError, model=model, tokenizer=tiny_tokenizer(), target_modules=("nothing",))
    refused(quick, tmp_path / "run", ConfigError, model=model, tokenizer=tiny_tokenizer(), early_stop=1, val=0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == attention
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_planted_refusal_that_writes_is_seen(tmp_path: Path) -> None:
    """`refused` itself can fail: a run that leaves a file behind and then refuses does not pass it."""

    def careless(out: Path, **changes: Any) -> None:
        out.mkdir()
        (out / "record.json").write_text(json.dumps({}))
        raise ConfigError("no")

    with pytest.raises(AssertionError):
        refused(careless, tmp_path / "run", ConfigError)
