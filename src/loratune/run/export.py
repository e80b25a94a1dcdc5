"""`export`: an adapter for other readers, read back and compared before anybody is told that it is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loratune.adapt.fit import check_fit
from loratune.adapt.plan import plan_as_written
from loratune.adapter import (
    Plain,
    SavedAdapter,
    adapter_folder,
    as_lora,
    card_of,
    gguf_tensors,
    plain,
    read_adapter,
    read_gguf,
    same_update,
    write_adapter,
    write_gguf,
)
from loratune.config.methods import VERA
from loratune.errors import CheckError, ConfigError, ModelError, nearest
from loratune.files import new_folder
from loratune.gguf import GgufModel, compare_model, refuse_family, shape_of, vocabulary_of, write_model
from loratune.model import empty_model
from loratune.run.folder import refuse_taken
from loratune.run.merge import folded
from loratune.run.opened import Opened, base_name, head_of, open_run
from loratune.run.task import require_language_model, saved_head

READERS = ("peft", "vllm", "gguf")
# vLLM's own default; a larger rank has to be announced to it.
_VLLM_RANK = 16
# Scales are folded in fp64 and rounded once to the factors' dtype.
_NEAR = 1e-2
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export(
    run: str,
    out: str,
    *,
    to: str,
    base: str | None = None,
    merged: bool = False,
    dtype: str = "auto",
    any_tokenizer: bool = False,
) -> dict[str, Any]:
    """Write an adapter as `to` reads it.

    - "peft": PEFT's files, as a run has them; a folder without the run beside it.
    - "vllm": PEFT's files of one rank, with the scale in B.
    - "gguf": one file for llama.cpp, `adapter.gguf` in the folder; merged, the whole model, `model.gguf`.

    Args:
        run: a run or adapter folder, or a hub id; merged, also a model, which is written as it is.
        base: where the base is now; what the adapter names otherwise.
        merged: fold the adapter into its base first, as `merge` does.
        dtype: of such a model's matrices: fp32, fp16, bf16 or, with "auto", what the base's files have.
        any_tokenizer: of such a model, as `merge` has it.

    Returns:
        Where it is, what was changed for the reader, and what it was compared with.

    Raises:
        AdapterFileError, ModelError: what the reader cannot hold, all of it. ConfigError: no such reader.
        RunFolderError: the folder is there already. CheckError: what was read back is another adapter or model.
    """
    if to not in READERS:
        raise ConfigError(f"--to {to}: no such reader{nearest(to, list(READERS))}", hint=", ".join(READERS))
    if merged:
        return _merged(run, out, to=to, base=base, dtype=dtype, any_tokenizer=any_tokenizer)
    if dtype != "auto" or any_tokenizer:
        raise ConfigError("--dtype and --any-tokenizer are of a merged model", hint="add --merged, or leave them out")
    target = Path(out).expanduser()
    refuse_taken(target)
    saved = read_adapter(adapter_folder(run))
    if base is not None:
        saved = replace(saved, base=base)
    notes: list[str] = []
    if to != "peft":
        require_language_model(saved_head(None, saved), f"export --to {to}", "--to peft")
        saved, notes = _low_rank(saved)
    if to == "gguf":
        found = plain(saved, "llama.cpp")
        return _gguf(saved, found._replace(notes=(*notes, *found.notes)), target)
    found = plain(saved, "vLLM") if to == "vllm" else Plain(saved, ())
    with new_folder(target) as folder:
        write_adapter(folder, found.adapter, card=card_of(found.adapter))
        away = same_update(saved, read_adapter(folder))
        if not away <= _NEAR:
            raise CheckError(f"what was read back is {away:.1%} from the adapter", hint="nothing was written")
    notes += found.notes
    r = found.adapter.config.r
    if to == "vllm" and r > _VLLM_RANK:
        notes.append(f"vllm serve … --max-lora-rank {r}: its default is {_VLLM_RANK}")
    return {"out": str(target), "to": to, "notes": notes, "verified": f"read back, updates {away:.0e} apart"}


def _low_rank(saved: SavedAdapter) -> tuple[SavedAdapter, list[str]]:
    """VeRA as what readers of LoRA take, with a word about it; the base says how many inputs its modules have."""
    if saved.config.peft_type != VERA:
        return saved, []
    if not saved.base:
        raise ModelError("the adapter does not say which base it was trained on", hint="name it with --base")
    model = empty_model(saved.base)
    planned = plan_as_written(model, saved.config)
    planned.check(saved.base)
    check_fit(model, planned, saved, saved.base)
    widths = {target.path: target.in_features for target in planned.targets}
    return as_lora(saved, widths), ["VeRA's vectors are multiplied into A and B, which are LoRA's then"]


def _gguf(saved: SavedAdapter, found: Plain, target: Path) -> dict[str, Any]:
    if not saved.base:
        raise ModelError("the adapter does not say which base it was trained on", hint="name it with --base")
    config: Any = empty_model(saved.base).config
    tied = bool(config.tie_word_embeddings)
    expected = gguf_tensors(found.adapter, config, tied=tied)
    with new_folder(target) as folder:
        write_gguf(folder / "adapter.gguf", found.adapter, config, tied=tied)
        _, read = read_gguf(folder / "adapter.gguf")
        if read.keys() != expected.keys() or not all(np.array_equal(read[name], expected[name]) for name in expected):
            raise CheckError("what was read back is another adapter", hint="nothing was written")
    verified = f"read back, {len(read)} tensors equal"
    return {"out": str(target / "adapter.gguf"), "to": "gguf", "notes": list(found.notes), "verified": verified}


def _merged(run: str, out: str, *, to: str, base: str | None, dtype: str, any_tokenizer: bool) -> dict[str, Any]:
    if to != "gguf":
        hint = "`loratune merge` writes a merged model for transformers and vLLM"
        raise ConfigError(f"--merged --to {to}: only gguf holds whole models", hint=hint)
    if dtype not in ("auto", *_DTYPES):
        raise ConfigError(f"--dtype {dtype}: no such format{nearest(dtype, list(_DTYPES))}", hint=", ".join(_DTYPES))
    target = Path(out).expanduser()
    refuse_taken(target)
    require_language_model(head_of(run, base), "export --merged --to gguf", "`loratune merge` writes a model as it is")
    config: Any = empty_model(base_name(run, base)).config
    refuse_family(config)
    if dtype == "auto":
        dtype = next((name for name, kept in _DTYPES.items() if kept == config.dtype), "fp32")
    # No model computes in fp16 here: merged in fp32, and rounded once.
    loaded = "fp32" if dtype == "fp16" else dtype
    opened = open_run(run, base=base, dtype=loaded, any_tokenizer=any_tokenizer, decoded=True)
    model: Any = opened.base.model
    shape = shape_of(model.config, model.base_model.rotary_emb.inv_freq)
    vocabulary = vocabulary_of(opened.base.tokenizer, model.config.vocab_size)
    with _plain_state(opened) as (state, checks), new_folder(target) as folder:
        name = f"{_called(opened.base.name)} {'base' if opened.lora is None else 'merged'}"
        whole = GgufModel(name, shape, vocabulary, state, _DTYPES[dtype])
        write_model(folder / "model.gguf", whole)
        count = compare_model(folder / "model.gguf", whole)
    verified = "; ".join([*checks, f"read back, {count} tensors equal"])
    return {"out": str(target / "model.gguf"), "to": "gguf", "notes": list(shape.notes), "verified": verified}


@contextmanager
def _plain_state(opened: Opened) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
    """The merged model's tensors, or a bare model's; and what they were compared with."""
    if opened.lora is None:
        yield opened.base.model.state_dict(), []
        return
    with folded(opened) as (state, detail):
        yield state, [f"merged ≡ adapter ({detail})"]


def _called(base: str) -> str:
    """A hub id's or folder's last part as it is: what follows a dot is often a number."""
    return Path(base).name.removesuffix(".gguf")
