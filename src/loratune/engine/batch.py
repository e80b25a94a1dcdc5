"""Rows with adapters of their own, continued together; they join and leave between two tokens.

Prompts go through the model packed, side by side without padding; afterwards every pass is one token of each row.
Nothing here knows of threads: whoever asks for the next step decides when.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loratune.adapt import Adapters
from loratune.engine.choose import GREEDY, Sampling, choose, is_sound
from loratune.engine.passes import Passes
from loratune.engine.slots import Slots
from loratune.engine.trial import longest_alike, places_in_memory, refuse_unmixable, why_not_batched
from loratune.errors import AdapterStateError, ConfigError, DataError, OutOfMemoryError
from loratune.model import context_of

# Fewer tokens than this, prompt and answer, are no use to anybody.
_FEWEST = 256

_log = logging.getLogger("loratune")

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
    written: int = 0

    @property
    def length(self) -> int:
        """Its tokens, of which the last one has no place in its slot yet."""
        return len(self.request.prompt) + self.written


@dataclass(frozen=True)
class Limits:
    """What an engine takes on at once.

    Attributes:
        slots: rows. prompt_tokens: of the prompts in one pass; a longer one has a pass alone, whose activations grow
            with it, but not with its square: scores are computed by blocks.
        longest: tokens of a row, prompt and answer; the model's context where it is None, and less where memory would
            not hold as many in all slots.
        reserved: bytes of memory that others will take, and slots do not.
    """

    slots: int = 32
    prompt_tokens: int = 2048
    longest: int | None = None
    reserved: int = 0


@dataclass
class Engine:
    """Continues rows of one model.

    Attributes:
        model: one that takes packed rows (`why_not_packed`), in evaluation mode.
        lora: its adapters, which requests name; without it every row has what is active on the model.
        longest: tokens of a row, as the limits, the model's context and memory allow.

    Raises:
        ConfigError: rows of this model cannot be continued together (`why_not_batched`).
        AdapterStateError: rows with one of the adapters cannot.
        OutOfMemoryError: the slots would have no room for rows of any use.
    """

    model: PreTrainedModel
    lora: Adapters | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self._tickets = count()
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []
        self._told: list[Chosen] = []
        self.longest = _longest(self.model, self.limits)
        embeddings: Any = self.model.get_input_embeddings()
        self._vocabulary: int = embeddings.weight.shape[0]
        self._slots = Slots(self.limits.slots, self.longest)
        self._passes = Passes(self.model, self._slots)
        self.refresh()
        for name in self.adapters:
            self.refuse_unmixable(name)

    # -- what may be asked for -------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Take the adapters as the handle has them now; those that a row still needs must be among them."""
        names = () if self.lora is None else self.lora.names
        self._passes.mixed = self.lora.mixed(*names) if self.lora is not None and names else None

    def refuse_unmixable(self, name: str) -> None:
        """Raise AdapterStateError where rows with this adapter of the handle's cannot be continued beside others."""
        assert self.lora is not None, "it has an adapter"
        mixed = self._passes.mixed
        refuse_unmixable(
            self.model, mixed if mixed is not None and name in mixed.names else self.lora.mixed(name), name
        )

    @property
    def adapters(self) -> tuple[str, ...]:
        return () if self._passes.mixed is None else self._passes.mixed.names

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._rows)

    @property
    def next_tickets(self) -> tuple[int, ...]:
        """Of the rows that the next step is over, unless others leave or come before it."""
        return tuple(row.ticket for row in (*self._rows, *self._beginning()))

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
            DataError: an empty prompt, one that leaves no room for an answer, or with tokens that the model has not.
            AdapterStateError: no such adapter.
        """
        _refuse_prompt(request.prompt, self.longest, self._vocabulary)
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
        """Forget a request, if there is one of this ticket; its slot is free for the next step."""
        self._waiting = deque(row for row in self._waiting if row.ticket != ticket)
        self._told = [chosen for chosen in self._told if chosen.ticket != ticket]
        self._leave([place for place, row in enumerate(self._rows) if row.ticket == ticket])

    # -- going on ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> list[Chosen]:
        """Let rows in where slots are free, and choose the next token of every row.

        Where a pass fails, no token is lost: the same step may be tried again, or some rows cancelled first.
        """
        begun = self._beginning()
        if self._rows or begun:
            logits = self._passed(begun)
            for row in begun:
                self._waiting.popleft()
                self._rows.append(row)
            self._told += self._choose(logits)
        told, self._told = self._told, []
        return told

    def _beginning(self) -> list[_Row]:
        """Those of the waiting that begin now: as many as there are slots, and no more prompt tokens than the limit."""
        found: list[_Row] = []
        tokens = 0
        for row in islice(self._waiting, self.limits.slots - len(self._rows)):
            tokens += len(row.request.prompt)
            if found and tokens > self.limits.prompt_tokens:
                break
            found.append(row)
        return found

    def _passed(self, begun: Sequence[_Row]) -> Tensor:
        """Logits of all rows, those that begin now behind the others; where it fails these still wait."""
        first, rows = len(self._rows), [*self._rows, *begun]
        tokens, lengths = [row.last for row in self._rows], [row.length for row in self._rows]
        prompts, names = [row.request.prompt for row in begun], [row.request.adapter for row in rows]
        try:
            logits = self._passes.over(tokens, lengths, prompts, names)
            if len(begun) > 1:
                # Kernels that go by blocks multiply what a mask hides by zero: NaN beside a prompt may have become its.
                for i in (~is_sound(logits[first:])).nonzero()[:, 0].tolist():
                    alone = prompts[i : i + 1], [names[first + i]]
                    logits[first + i] = self._passes.over((), (), *alone, first=first + i)[0]
        except BaseException:
            for slot in range(first, len(rows)):
                self._slots.clear(slot)
            raise
        return logits

    def _choose(self, logits: Tensor) -> list[Chosen]:
        """The next token of every row; those that end leave."""
        rows = self._rows
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
                gone.append(place)
        self._leave(gone)
        return told

    def _leave(self, places: Sequence[int]) -> None:
        """Free slots; the last row moves into each, so that those in use stay first."""
        for place in sorted(places, reverse=True):
            last = self._rows.pop()
            self._slots.clear(place)
            if place < len(self._rows):
                self._slots.move(len(self._rows), place)
                self._rows[place] = last


def _longest(model: PreTrainedModel, limits: Limits) -> int:
    known = [length for length in (limits.longest, context_of(model)) if length is not None]
    asked = min(known, default=4096)
    why = why_not_batched(model, asked)
    if why is not None:
        alike = longest_alike(model)
        hint = "answer one prompt at a time" if alike is None else f"let rows have {alike:,} tokens at most"
        raise ConfigError(f"rows of this model cannot be continued together: {why}", hint=hint)
    fits = places_in_memory(model, limits.reserved) // limits.slots
    if fits >= asked:
        return asked
    if fits < _FEWEST:
        raise OutOfMemoryError(
            f"memory holds {fits:,} tokens in each of {limits.slots} slots"
            + (f", beside {limits.reserved / 2**30:.1f} GB for adapters" if limits.reserved else ""),
            hint="have fewer slots, fewer adapters at once, or a smaller model",
        )
    _log.warning("a row has %s tokens at most, not %s: memory holds no more in %s slots", fits, asked, limits.slots)
    return fits


def _refuse_prompt(prompt: Sequence[int], longest: int, vocabulary: int) -> None:
    """Raise DataError unless a model of this vocabulary can continue it within so many tokens."""
    if not prompt:
        raise DataError("the prompt is empty", hint="give at least one token")
    if len(prompt) >= longest:
        raise DataError(
            f"the prompt has {len(prompt):,} tokens, and a row at most {longest:,}",
            hint="shorten it, so that there is room for an answer",
        )
    foreign = [token for token in prompt if not 0 <= token < vocabulary]
    if foreign:
        raise DataError(
            f"the prompt has a token {foreign[0]}, and the model those from 0 to {vocabulary - 1:,}",
            hint="encode it with the model's own tokenizer",
        )


def _probabilities(logits: Tensor, token: int, request: Request) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """log p of the token, and the likeliest tokens with theirs; of the model, whatever the temperature."""
    if request.alternatives is None:
        return None, ()
    logs = logits.float().log_softmax(-1)
    values, tokens = logs.topk(min(request.alternatives, len(logs)))
    own = float(logs[token])
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    return (own if math.isfinite(own) else None), tuple(pair for pair in pairs if math.isfinite(pair[1]))
