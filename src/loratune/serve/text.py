"""Tokens as text that can be sent on: whole characters, and nothing that may become a stop sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from loratune.engine import Chosen


class Text:
    """The text of one answer as its tokens come.

    Attributes:
        ids: its tokens, a final stop token left out. written: what has been given out. finish: why it ended, or None.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stop for stop in stops if stop)
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held = ""
        self.ids: list[int] = []
        self.written = ""
        self.finish: str | None = None

    def add(self, chosen: Chosen) -> str:
        """What can be given out after this token."""
        if chosen.finish != "stop":
            self.ids.append(chosen.token)
            self._held += self._stream.step(self._tokenizer.backend_tokenizer, chosen.token) or ""
        if chosen.finish is not None:
            whole = str(self._tokenizer.decode(self.ids, skip_special_tokens=True))
            if whole.startswith(self.written + self._held):  # the bytes of half a character at the end
                self._held = whole[len(self.written) :]
            self.finish = chosen.finish
        return self._give()

    def _give(self) -> str:
        """What is held, up to a stop sequence or to what may be the beginning of one."""
        ends = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if ends:
            out, self._held, self.finish = self._held[: min(ends)], "", "stop"
        else:
            keep = 0 if self.finish is not None else self._may_begin()
            out = self._held[: len(self._held) - keep]
            self._held = self._held[len(out) :]
        self.written += out
        return out

    def _may_begin(self) -> int:
        """How many characters at the end a stop sequence begins with."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
