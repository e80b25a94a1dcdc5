"""Models on the hub.

transformers fetches file by file while it loads, takes a broken connection for a file that does not exist, and asks
again for each part. Here everything is there, of one commit, before anything is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from loratune.errors import ModelError
from loratune.hub import snapshot

KINDS = "a model is a hub id, a folder or a .gguf file"
# Configs, tokenizers and templates; in folders of the repository stand other formats and other models.
_TOKENIZERS = ["*.txt", "*.model", "*.tiktoken", "*.spm", "*.codes", "*.tokenizer"]
_SMALL, _WITHOUT = ["*.json", "*.jinja", *_TOKENIZERS], ["*/*.json", *(f"*/{one}" for one in _TOKENIZERS)]
# Some repositories hold the same weights once more under other names.
_SAFE, _PICKLED = "model*.safetensors", "pytorch_model*.bin"


def fetched(name: str, *, weights: bool) -> Path:
    """The folder of a commit's files, named by the commit: all that loading needs, or all but the weights.

    Raises:
        ModelError: as `snapshot`, or weights are missing.
    """
    folder = _files(name)
    if weights:
        folder = _files(name, _SAFE)
        if not any(folder.glob(_SAFE)):
            folder = _files(name, _PICKLED)
        _refuse_missing(name, folder)
    return folder


def _files(name: str, *more: str) -> Path:
    return snapshot(name, [*_SMALL, *more], without=_WITHOUT, error=ModelError, kinds=KINDS)


def _refuse_missing(name: str, folder: Path) -> None:
    there = any(folder.glob(_SAFE)) or any(folder.glob(_PICKLED))
    needed = {shard for index in folder.glob("*.index.json") for shard in _shards(index)}
    missing = sorted(shard for shard in needed if not (folder / shard).exists())
    if there and not missing:
        return
    what = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "") if missing else "its weights"
    raise ModelError(
        f"{name}: {what} not in {folder}",
        hint="a base has all of model*.safetensors or of pytorch_model*.bin in its repository",
    )


def _shards(index: Path) -> Iterator[str]:
    # Of indices of both kinds only that of the kind which is there counts.
    if any(index.parent.glob(_SAFE)) == ("safetensors" in index.name):
        yield from set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
