"""The hub: files of a repository in its cache, fetched first where they are not there."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loratune.errors import LoratuneError


def snapshot(
    name: str,
    files: Sequence[str],
    *,
    error: type[LoratuneError],
    kinds: str,
    without: Sequence[str] = (),
    revision: str | None = None,
) -> Path:
    """The folder of one commit's files, named by the commit.

    Args:
        name: a hub id. files, without: patterns of what is needed, and of what is not.
        error: what is raised. kinds: a sentence that says what else a name may be.

    Raises:
        LoratuneError: as `error`: no such repository, no access to it, the hub cannot be reached, or the download broke
            off.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        with _bars_for_people():
            return Path(
                snapshot_download(name, revision=revision, allow_patterns=list(files), ignore_patterns=list(without))
            )
    except GatedRepoError:
        raise error(f"{name}: access has to be asked for", hint="ask on its page, then set HF_TOKEN") from None
    except (RepositoryNotFoundError, HFValidationError):
        hint = f"{kinds}; a private one needs HF_TOKEN"
        raise error(f"{name}: no such folder, and nothing of this name on the hub", hint=hint) from None
    except RevisionNotFoundError:
        raise error(f"{name}: it has no revision {revision!r}", hint="a revision is a branch, tag or commit") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise _out_of_reach(name, error, kinds) from None
    except Exception as reason:
        said = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
        hint = "run the same command again: files that came whole are kept"
        raise error(f"{name}: the download broke off: {said}", hint=hint) from reason


def _out_of_reach(name: str, error: type[LoratuneError], kinds: str) -> LoratuneError:
    from huggingface_hub import constants

    cache = f"{name}: no such folder, and not all of it is in the cache ({constants.HF_HUB_CACHE})"
    if constants.HF_HUB_OFFLINE:
        return error(f"{cache}, and HF_HUB_OFFLINE forbids to fetch it", hint=f"{kinds}; unset HF_HUB_OFFLINE once")
    return error(f"{cache}, and {constants.ENDPOINT} cannot be reached", hint=f"{kinds}; check the connection")


@contextmanager
def _bars_for_people() -> Iterator[None]:
    """The hub's own bars on a terminal, since a download takes long; nowhere its warnings of each broken attempt."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    log, hidden = logging.getLogger("huggingface_hub"), are_progress_bars_disabled()
    level = log.level
    log.setLevel(logging.ERROR)
    if not sys.stderr.isatty() or "CI" in os.environ:
        disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if not hidden:
            enable_progress_bars()
