"""A conversation with one or two models that hear the same messages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from loratune.engine import Answer, Sampling, generate, make_ready
from loratune.errors import ConfigError
from loratune.model import stop_ids
from loratune.run.opened import Opened, open_run
from loratune.run.task import require_language_model


@dataclass
class Speaker:
    """One side: a model, whether its adapter is on, and what was said so far."""

    name: str
    opened: Opened
    adapter_on: bool
    messages: list[dict[str, str]] = field(default_factory=list)

    def answer(self, message: str, sampling: Sampling, hear: Callable[[str], None]) -> Answer:
        """Say something to it; its answer, of which `hear` is told each piece, joins its own history."""
        model, tokenizer = self.opened.base.model, self.opened.base.tokenizer
        asked = {"role": "user", "content": message}
        prompt = self._prompt(tokenizer, [*self.messages, asked])
        off = self.opened.lora is not None and not self.adapter_on
        with self.opened.lora.disabled() if off and self.opened.lora is not None else nullcontext():
            stops = stop_ids(model, tokenizer)
            (answer,) = generate(model, tokenizer, [prompt], stops, sampling, hear=lambda _, piece: hear(piece))
        self.messages += [asked, {"role": "assistant", "content": answer.text}]
        return answer

    def _prompt(self, tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
        if tokenizer.chat_template is None:
            return list(tokenizer("".join(m["content"] for m in messages))["input_ids"])
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass
class Conversation:
    speakers: tuple[Speaker, ...]
    sampling: Sampling

    @classmethod
    def open(cls, run: str, *, vs: str | None, system: str | None, sampling: Sampling, **opening: Any) -> Conversation:
        """Open `run`, and beside it its base (sharing the weights) or another run; `opening` goes to `open_run`."""
        opened = open_run(run, **opening)
        require_language_model(opened.base.head, "chat", "`loratune eval RUN --data FILE` measures it")
        speakers = [Speaker(run, opened, adapter_on=True)]
        if vs == "base":
            if opened.lora is None:
                raise ConfigError(f"{run} is a base itself, so there is nothing to compare", hint="leave --vs out")
            speakers.insert(0, Speaker("base", opened, adapter_on=False))
        elif vs is not None:
            other = open_run(vs, **opening)
            require_language_model(other.base.head, "chat", "name another run with --vs")
            speakers.append(Speaker(vs, other, adapter_on=True))
        for speaker in speakers:
            make_ready(speaker.opened.base.model)
            if system:
                speaker.messages.append({"role": "system", "content": system})
        return cls(tuple(speakers), sampling)

    def say(self, message: str, hear: Callable[[int, str], None] = lambda _, __: None) -> list[tuple[str, Answer]]:
        """The speakers' answers, in their order; `hear` is told each piece as it comes, by the speaker's place."""
        return [
            (speaker.name, speaker.answer(message, self.sampling, partial(hear, place)))
            for place, speaker in enumerate(self.speakers)
        ]

    def forget(self) -> None:
        """Start over; system messages stay."""
        for speaker in self.speakers:
            speaker.messages = [m for m in speaker.messages if m["role"] == "system"]
