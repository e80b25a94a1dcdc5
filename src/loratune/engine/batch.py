"""Rows with adapters of their own, continued together; they join and leave between two tokens.

Prompts go through the model packed, side by side without padding; afterwards every pass is one token of each row.
Nothing here knows of threads: whoever asks for the next step decides when.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import accumulate, count
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loratune.adapt import Adapters, Mixed
from loratune.engine.choose import GREEDY, Sampling, choose
from loratune.engine.slots import Slots
from loratune.errors import AdapterStateError, DataError
from loratune.model import SlotStep, context_of, only_positions, packed_inputs

Finish = Literal["stop", "length", "broken"]


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for.

    Attributes:
        prompt: token ids. adapter: the name of one, or None for the base.
        stop_ids: tokens that end the answer and are no part of it.
        alternatives: how many of the likeliest tokens are told beside each chosen one; None for no probabilities.
    """

    prompt: tuple[int, ...]
    stop_ids: frozenset[int]
    sampling: Sampling = GREEDY
    adapter: str | None = None
    alternatives: int | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """The next token of an answer.

    Attributes:
        ticket: what `submit` gave. finish: why the answer ends with it, or None. A stop token is told too.
        logprob: of the token. likeliest: tokens with theirs, where they were asked for.
    """

    ticket: int
    token: int
    finish: Finish | None
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class _Row:
    """One that is being continued; its slot is its place in the list."""

    ticket: int
    request: Request
    most: int
    dice: torch.Generator | None
    last: int = 0
    length: int = 0
    written: int = 0


@dataclass(frozen=True)
class Limits:
    """What an engine takes on at once.

    Attributes:
        slots: rows. prompt_tokens: of the prompts in one pass, but for a longer one alone.
        longest: tokens of a row, prompt and answer; the model's context where it is None.
    """

    slots: int = 32
    prompt_tokens: int = 2048
    longest: int | None = None


@dataclass
class Engine:
    """Continues rows of one model.

    Attributes:
        model: one that takes packed rows (`why_not_packed`), in evaluation mode.
        lora: its adapters, which requests name; without it every row has what is active on the model.
    """

    model: PreTrainedModel
    lora: Adapters | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self._tickets = count()
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []
        context = context_of(self.model)
        known = [length for length in (self.limits.longest, context) if length is not None]
        self.longest = min(known, default=4096)
        self._slots = Slots(self.limits.slots, self.longest)
        self._mixed: Mixed | None = None
        self.refresh()

    # -- what may be asked for -------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Take the adapters as the handle has them now; those that a row still needs must be among them."""
        names = () if self.lora is None else self.lora.names
        self._mixed = self.lora.mixed(*names) if self.lora is not None and names else None

    @property
    def adapters(self) -> tuple[str, ...]:
        return () if self._mixed is None else self._mixed.names

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._rows)

    @property
    def busy(self) -> bool:
        """Whether a row waits or runs."""
        return bool(self._rows or self._waiting)

    def uses(self, adapter: str) -> bool:
        """Whether a row that waits or runs has this adapter."""
        return any(row.request.adapter == adapter for row in (*self._waiting, *self._rows))

    def submit(self, request: Request) -> int:
        """Let a request wait for a slot; gives the ticket that its tokens will carry.

        Raises:
            DataError: an empty prompt, or one that leaves no room for an answer. AdapterStateError: no such adapter.
        """
        if not request.prompt:
            raise DataError("the prompt is empty", hint="give at least one token")
        if len(request.prompt) >= self.longest:
            raise DataError(
                f"the prompt has {len(request.prompt):,} tokens, and a row at most {self.longest:,}",
                hint="shorten it, so that there is room for an answer",
            )
        if request.adapter is not None and request.adapter not in self.adapters:
            raise AdapterStateError(
                f"no adapter {request.adapter!r}", hint=f"loaded: {', '.join(self.adapters) or 'none'}"
            )
        sampling, dice = request.sampling, None
        if not sampling.greedy:
            dice = torch.Generator().manual_seed(sampling.seed)
        most = min(sampling.max_new_tokens, self.longest - len(request.prompt))
        row = _Row(next(self._tickets), request, most, dice)
        self._waiting.append(row)
        return row.ticket

    def cancel(self, ticket: int) -> None:
        """Forget a request; its slot is free for the next step."""
        self._waiting = deque(row for row in self._waiting if row.ticket != ticket)
        self._leave([place for place, row in enumerate(self._rows) if row.ticket == ticket])

    # -- going on ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> list[Chosen]:
        """Let rows in where slots are free, and choose the next token of every row."""
        told = self._begin(self._admitted())
        if self._rows:
            told += self._go_on()
        return told

    def _admitted(self) -> list[_Row]:
        """Those that begin now: as many as there are slots, and no more prompt tokens than the limit."""
        found: list[_Row] = []
        tokens = 0
        while self._waiting and len(self._rows) + len(found) < self.limits.slots:
            tokens += len(self._waiting[0].request.prompt)
            if found and tokens > self.limits.prompt_tokens:
                break
            found.append(self._waiting.popleft())
        return found

    def _begin(self, rows: list[_Row]) -> list[Chosen]:
        """One pass over the prompts of rows that are let in, and the first token of each."""
        if not rows:
            return []
        counts = [len(row.request.prompt) for row in rows]
        first = len(self._rows)
        self._slots.take_prompts(range(first, first + len(rows)), counts)
        ids = torch.tensor([[token for row in rows for token in row.request.prompt]])
        positions = torch.cat([torch.arange(length) for length in counts])[None]
        ends = torch.tensor(list(accumulate(counts))) - 1
        self._rows += rows
        for row, length in zip(rows, counts, strict=True):
            row.length = length
        with only_positions(self.model, ends.to(self.model.device)):
            logits = self._pass(rows, counts, ids, positions, packed_inputs(tuple(counts)))[0]
        return self._choose(first, logits)

    def _go_on(self) -> list[Chosen]:
        """One pass over the last token of every row."""
        rows, device = self._rows, self.model.device
        lengths = [row.length + 1 for row in rows]
        for row in rows:
            row.length += 1
        self._slots.take_step(lengths, device)
        ids = torch.tensor([[row.last] for row in rows])
        positions = torch.tensor([[length - 1] for length in lengths])
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)  # nothing reads it, and none is built
        step = {"step": SlotStep.of(lengths, device), "attention_mask": mask}
        return self._choose(0, self._pass(rows, [1] * len(rows), ids, positions, step)[:, 0])

    def _pass(
        self, rows: Sequence[_Row], counts: Sequence[int], ids: Tensor, positions: Tensor, told: dict[str, Any]
    ) -> Tensor:
        device = self.model.device
        inputs = {**told, "past_key_values": self._slots, "use_cache": True}
        names = [row.request.adapter for row in rows]
        with nullcontext() if self._mixed is None else self._mixed.passing(names, counts, device):
            logits: Tensor = self.model(input_ids=ids.to(device), position_ids=positions.to(device), **inputs).logits
        return logits

    def _choose(self, first: int, logits: Tensor) -> list[Chosen]:
        """The next token of the rows from place `first` on; those that end leave."""
        rows = self._rows[first:]
        chosen, sound = choose(logits, [row.request.sampling for row in rows], [row.dice for row in rows])
        told, gone = [], []
        for place, (row, token, fine) in enumerate(zip(rows, chosen.tolist(), sound.tolist(), strict=True)):
            row.last, row.written = token, row.written + 1
            finish: Finish | None = None
            if not fine:
                finish = "broken"
            elif token in row.request.stop_ids:
                finish = "stop"
            elif row.written >= row.most:
                finish = "length"
            told.append(Chosen(row.ticket, token, finish, *_probabilities(logits[place], token, row.request)))
            if finish is not None:
                gone.append(first + place)
        self._leave(gone)
        return told

    def _leave(self, places: Sequence[int]) -> None:
        """Free slots; the last row moves into each, so that those in use stay first."""
        for place in sorted(places, reverse=True):
            last = self._rows.pop()
            if place < len(self._rows):
                self._slots.move(len(self._rows), place, last.length)
                self._rows[place] = last


def _probabilities(logits: Tensor, token: int, request: Request) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """log p of the token, and the likeliest tokens with theirs; of the model, whatever the temperature."""
    if request.alternatives is None:
        return None, ()
    logs = logits.float().log_softmax(-1)
    values, tokens = logs.topk(request.alternatives) if request.alternatives else (logs[:0], logs[:0].long())
    own = float(logs[token])
    likeliest = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return (own if math.isfinite(own) else None), likeliest
