"""What the routes have in common."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratune.serve.library import Library
from loratune.serve.metrics import Metrics
from loratune.serve.words import Words
from loratune.serve.worker import Worker


@dataclass
class Service:
    """What the routes have in common.

    Attributes:
        stop_ids: tokens that end an answer.
        allowed: the folder from which adapters may be loaded by request; none may without it.
        api_key: what callers must show, or None. hosts: names by which the server may be called; None for any.
        largest: bytes of a request's body at most. grace: seconds that answers have to end.
    """

    worker: Worker
    tokenizer: Any
    stop_ids: frozenset[int]
    allowed: Path | None = None
    api_key: str | None = None
    hosts: Collection[str] | None = None
    largest: int = 4 << 20
    grace: float = 30.0
    started: int = field(default_factory=lambda: int(time.time()))
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self.words = Words(self.tokenizer)

    @property
    def library(self) -> Library:
        return self.worker.library
