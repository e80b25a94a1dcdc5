"""`export`: an adapter for other readers, read back and compared before anybody is told that it is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loratune.adapter import (
    Plain,
    SavedAdapter,
    adapter_folder,
    card_of,
    gguf_tensors,
    plain,
    read_adapter,
    read_gguf,
    same_update,
    write_adapter,
    write_gguf,
)
from loratune.errors import CheckError, ConfigError, ModelError, nearest
from loratune.files import new_folder
from loratune.model import empty_model
from loratune.run.folder import refuse_taken

READERS = ("peft", "vllm", "gguf")
# vLLM's own default; a larger rank has to be announced to it.
_VLLM_RANK = 16
# Scales are folded in fp64 and rounded once to the factors' dtype.
_NEAR = 1e-2


def export(run: str, out: str, *, to: str, base: str | None = None) -> dict[str, Any]:
    """Write an adapter as `to` reads it.

    - "peft": PEFT's files, as a run has them; a folder without the run beside it.
    - "vllm": PEFT's files of one rank, with the scale in B.
    - "gguf": one file for llama.cpp, `adapter.gguf` in the folder.

    Args:
        run: a run or adapter folder, or a hub id. base: where the base is now; what the adapter names otherwise.

    Returns:
        Where it is, what was changed for the reader, and what it was compared with.

    Raises:
        AdapterFileError: what the reader cannot hold, all of it. ConfigError: no such reader.
        RunFolderError: the folder is there already. CheckError: what was read back is another adapter.
    """
    if to not in READERS:
        raise ConfigError(f"--to {to}: no such reader{nearest(to, list(READERS))}", hint=", ".join(READERS))
    target = Path(out).expanduser()
    refuse_taken(target)
    saved = read_adapter(adapter_folder(run))
    if base is not None:
        saved = replace(saved, base=base)
    if to == "gguf":
        return _gguf(saved, plain(saved, "llama.cpp"), target)
    found = plain(saved, "vLLM") if to == "vllm" else Plain(saved, ())
    write_adapter(target, found.adapter, card=card_of(found.adapter))
    away = same_update(saved, read_adapter(target))
    _require(away)
    notes = list(found.notes)
    r = found.adapter.config.r
    if to == "vllm" and r > _VLLM_RANK:
        notes.append(f"vllm serve … --max-lora-rank {r}: its default is {_VLLM_RANK}")
    return {"out": str(target), "to": to, "notes": notes, "verified": f"read back, updates {away:.0e} apart"}


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


def _require(away: float) -> None:
    if not away <= _NEAR:
        raise CheckError(f"what was read back is {away:.1%} from the adapter", hint="do not use it; report this")
