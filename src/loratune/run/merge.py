"""`merge`: a plain model folder with the adapter folded in, verified against the adapter before it is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from loratune.data.batch import Batch
from loratune.data.pack import one_batch
from loratune.data.tasks import DATA_TASKS
from loratune.errors import AdapterStateError, RunFolderError
from loratune.model import save_plain
from loratune.run.folder import refuse_taken
from loratune.run.opened import Opened
from loratune.training.checks import merged_is_adapter, require

# Text to compare both models on where no held-out rows are at hand.
_PROBE = "The quick brown fox explains, step by step, how a bridge carries its load, and what it costs to build one."


def merge(opened: Opened, out: str) -> dict[str, Any]:
    """Fold the adapter into the base's weights and save a folder that `transformers` loads.

    Raises:
        AdapterStateError: tied weights would part, or a merged weight would not be finite.
        CheckError: the merged model computes something else than the adapter; nothing is written.
        RunFolderError: the folder is there already, or has a name that transformers cannot write to.
    """
    target = Path(out)
    refuse_taken(target)
    _refuse_name(target)
    with folded(opened) as (state, detail):
        save_plain(opened.base.model, state, opened.base.tokenizer, target)
    return {"out": str(target), "dtype": str(opened.base.model.dtype).removeprefix("torch."), "verified": detail}


def _refuse_name(folder: Path) -> None:
    try:
        str(folder).encode("utf-8")
    except UnicodeEncodeError:
        raise RunFolderError(f"{str(folder)!r} is not UTF-8", hint="name another folder with --out") from None


@contextmanager
def folded(opened: Opened) -> Iterator[tuple[dict[str, Tensor], str]]:
    """Inside the block the adapter is in the base's weights; their state, and what they were compared with.

    Raises:
        AdapterStateError, CheckError: as `merge`.
    """
    if opened.lora is None:
        raise AdapterStateError(f"{opened.base.name} has no adapter to merge", hint="name a run or an adapter folder")
    check = merged_is_adapter(opened.base.model, opened.lora, _probe(opened))
    require([check], hint="nothing was written; --dtype fp32 merges with less rounding")
    opened.lora.merge()
    try:
        yield opened.lora.base_state(), check.detail
    finally:
        opened.lora.unmerge()


def _probe(opened: Opened) -> Batch:
    base = opened.base
    row = DATA_TASKS[base.head.task].probe(tuple(base.tokenizer(_PROBE)["input_ids"]))
    return one_batch([row], packed=False, pad_id=base.pad_id).to(base.device)
