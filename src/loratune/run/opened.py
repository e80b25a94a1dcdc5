"""A run opened again: its base with its adapter attached, after seeing that the two belong together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.adapt import Adapters, attach
from loratune.adapter import adapter_folder, read_adapter
from loratune.errors import AdapterFileError, ModelError
from loratune.model import Base, Head, find_base, tokenizer_hashes, use_packed_attention
from loratune.quant import dequantize
from loratune.run.folder import RunFolder
from loratune.run.task import model_head, saved_head


@dataclass(frozen=True)
class Opened:
    """A base in evaluation mode, its adapter (None for a bare model), and the record if a run left one."""

    base: Base
    lora: Adapters | None
    record: dict[str, Any] | None


def open_run(
    run: str,
    *,
    base: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    quant: str | None = None,
    any_tokenizer: bool = False,
    decoded: bool = False,
) -> Opened:
    """Open a run folder, an adapter folder or hub id, or a bare model.

    Args:
        base: where the base is now; what the run names otherwise.
        quant: the format of few bits in which the base is kept; what a run's record says where it is None.
        any_tokenizer: accept a tokenizer or chat template that the adapter was not trained with.
        decoded: of a base that the run kept in few bits, the dense weights that these stand for.

    Raises:
        AdapterFileError: damaged, or trained on another base or tokenizer. ModelError: the base cannot be loaded.
    """
    folder = _folder_of(run)
    name = base_name(run, base)
    head = head_of(run, base)
    if not _is_adapter(folder):
        return Opened(find_base(name, dtype=dtype, device=device, quant=quant, head=head), None, None)
    record = RunFolder(folder).record()
    if record and dtype == "auto":
        dtype = record["base"]["dtype"]
    if record and quant is None:
        quant = record["settings"].get("quant", {}).get("value")
    found = find_base(name, dtype=dtype, device=device, quant=quant, head=head)
    decoded = decoded and quant is not None
    if decoded:
        dequantize(found.model)
    if record:
        _refuse_strangers(folder, record, found, any_tokenizer=any_tokenizer)
        if record["plan"]["packed"]:
            use_packed_attention(found.model)
    # A run's record holds the hashes of its tokenizer; a plain adapter's files may too.
    tokenizer = None if record or any_tokenizer else found.tokenizer
    # A decoded base has other weights than the one it comes from, which the record's hash has been compared with.
    return Opened(found, attach(found.model, folder, tokenizer=tokenizer, any_base=decoded), record)


def head_of(run: str, base: str | None = None) -> Head:
    """What the base of a run or adapter, or a bare model, is loaded as.

    Raises:
        AdapterFileError, ModelError: as `base_name`.
    """
    folder, name = _folder_of(run), base_name(run, base)
    return saved_head(RunFolder(folder).record(), read_adapter(folder)) if _is_adapter(folder) else model_head(name)


def base_name(run: str, base: str | None = None) -> str:
    """The base of a run or adapter, a bare model's own name; `base` where the base is elsewhere now.

    Raises:
        AdapterFileError: the adapter is damaged, or not there yet. ModelError: it names no base.
    """
    folder = _folder_of(run)
    if not _is_adapter(folder):
        if (folder / "record.json").is_file():
            hint = "let `loratune train` finish it"
            raise AdapterFileError(f"{folder} holds a run without an adapter yet", hint=hint)
        return run
    saved, record = read_adapter(folder), RunFolder(folder).record()
    name = base or (record["base"]["name"] if record else saved.base)
    if not name:
        raise ModelError(f"{folder} does not say which base it was trained on", hint="name it with --base")
    return str(name)


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _folder_of(run: str) -> Path:
    """The folder of a run or adapter; what is none stays what it was and may be a model."""
    try:
        return adapter_folder(run)
    except AdapterFileError as error:
        if error.__cause__ is not None:  # it is there, and its download broke off
            raise
        return Path(run)


def _refuse_strangers(folder: Path, record: dict[str, Any], base: Base, *, any_tokenizer: bool) -> None:
    problems, hints = [], []
    if base.fingerprint != record["base"]["fingerprint"]:
        problems.append(f"{folder} was trained on {record['base']['name']}, and {base.name} has other weights")
        hints.append("name the base it was trained on with --base")
    if not any_tokenizer:
        now = dict(zip(("sha256", "chat_template_sha256"), tokenizer_hashes(base.tokenizer), strict=True))
        for key, word in (("sha256", "tokenizer"), ("chat_template_sha256", "chat template")):
            if now[key] != record["tokenizer"][key]:
                problems.append(f"{folder} was trained with another {word} than {base.name} has")
                hints.append("give the base its own tokenizer back, or say --any-tokenizer")
    if problems:
        raise AdapterFileError(problems, hint="; ".join(dict.fromkeys(hints)))
