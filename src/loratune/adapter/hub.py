"""Where an adapter's files are: a folder, or a hub id that is fetched into the hub's cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from loratune.errors import AdapterFileError
from loratune.hub import snapshot

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HINT = "an adapter is a folder or a hub id like owner/name"
# Nothing else is fetched: other files in such a repository may be pickles or gigabytes.
_FILES = ["adapter_config.json", "adapter_model.safetensors", "loratune.json", "README.md"]
_TOKENIZER = [
    "added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
]  # fmt: skip


def adapter_folder(name: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """The local folder of an adapter.

    Raises:
        AdapterFileError: no such folder, and it cannot be had from the hub.
    """
    given: object = name
    if not isinstance(given, str | os.PathLike):
        raise AdapterFileError(f"a {type(given).__name__} names no adapter", hint=_HINT)
    path = Path(name).expanduser()
    if path.exists() or not isinstance(name, str) or not _HUB_ID.fullmatch(name):
        return path
    return snapshot(name, [*_FILES, *_TOKENIZER], error=AdapterFileError, kinds=_HINT, revision=revision)
