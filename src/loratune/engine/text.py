"""Tokens as text that can be sent on: whole characters, and nothing that may become a stop sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loratune.engine.batch import Chosen

# A character has four bytes at most: after so many tokens without a whole one, what came is no part of any.
_QUIET = 16
_NO_CHARACTER = "\ufffd"


class Text:
    """The text of one answer as its tokens come.

    Attributes:
        written: what has been given out. finish: why it ended, or None. tokens: how many came, the stop token too.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], after: Sequence[int] = ()) -> None:
        """`after`: the tokens that the answer continues, where it is one text with them."""
        self._decoder, self._stops = tokenizer.backend_tokenizer, tuple(stop for stop in stops if stop)
        # The last tokens: first those that are text already, on which it depends what the others become: SentencePiece
        # leaves out a space that a text begins with.
        self._window = list(after[-_QUIET:])
        self._read, self._before = self._whole()
        # What the others are so far, which may end in half a character; and text that may begin a stop sequence.
        self._open = self._held = ""
        self._told: list[tuple[int, Chosen]] = []
        self._cut = False
        self.written = ""
        self.finish: str | None = None
        self.tokens = 0

    def add(self, chosen: Chosen) -> str:
        """What can be given out after this token."""
        self.tokens += 1
        if chosen.finish != "stop":
            self._window.append(chosen.token)
            before, self._open = self._open, self._decoded()[len(self._before) :]
            self._tell(chosen, _alike(before, self._open))
        self._settle(last=chosen.finish is not None)
        self.finish = chosen.finish
        return self._give()

    def told(self) -> list[tuple[int, Chosen]]:
        """Tokens whose text has begun since the last call, each with where it begins; a stop token is none of them."""
        everything = self.finish is not None and not self._cut
        count = sum(everything or offset < len(self.written) for offset, _ in self._told)
        found, self._told = self._told[:count], self._told[count:]
        return found

    def _whole(self) -> tuple[int, str]:
        """How many of the tokens are whole characters together, and their text; half a one is the answer's to end."""
        for count in range(len(self._window), 0, -1):
            text = str(self._decoder.decode(self._window[:count], skip_special_tokens=True))
            if not text.endswith(_NO_CHARACTER):
                return count, text
        return 0, ""

    def _decoded(self) -> str:
        return str(self._decoder.decode(self._window, skip_special_tokens=True))

    def _tell(self, chosen: Chosen, place: int) -> None:
        """A token whose text begins at this place of what is open; so do those of which it ends the character."""
        begins = len(self.written) + len(self._held) + place
        self._told = [(min(offset, begins), one) for offset, one in self._told]
        self._told.append((begins, chosen))

    def _settle(self, *, last: bool) -> None:
        """Hold what is open as text; half a character waits, but for the last token."""
        quiet = len(self._window) - self._read
        if self._open.endswith(_NO_CHARACTER) and quiet <= _QUIET and not last:
            return
        if self._open:
            del self._window[: self._read]
            self._read, self._before = len(self._window), self._decoded()
        elif quiet > _QUIET:  # special tokens
            del self._window[self._read :]
        self._held, self._open = self._held + self._open, ""

    def _give(self) -> str:
        """What is held, up to a stop sequence or to what may be the beginning of one."""
        ends = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        begins = len(self._held) if self.finish is not None else self._may_begin()
        if ends and min(ends) <= begins:
            out, self._held, self.finish, self._cut = self._held[: min(ends)], "", "stop", True
        else:
            out, self._held = self._held[:begins], self._held[begins:]
        self.written += out
        return out

    def _may_begin(self) -> int:
        """The first place from which on a stop sequence is begun and not ended."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for place in range(max(0, len(self._held) - longest), len(self._held)):
            if any(stop.startswith(self._held[place:]) for stop in self._stops):
                return place
        return len(self._held)


def _alike(one: str, other: str) -> int:
    """How many characters they begin with together."""
    differing = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))
