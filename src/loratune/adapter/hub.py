"""Where an adapter's files are: a folder, or a hub id that is fetched into the hub's cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from loratune.errors import AdapterFileError

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
        AdapterFileError: no such folder, and the hub does not have it or cannot be reached.
    """
    given: object = name
    if not isinstance(given, str | os.PathLike):
        raise AdapterFileError(f"a {type(given).__name__} names no adapter", hint=_HINT)
    path = Path(name).expanduser()
    if path.exists() or not isinstance(name, str) or not _HUB_ID.fullmatch(name):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*_FILES, *_TOKENIZER]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AdapterFileError(
            f"{name}: no such folder, and no adapter of this name could be fetched ({reason})",
            hint=_HINT,
        ) from None
