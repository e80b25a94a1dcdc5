"""What is said over the wire, in OpenAI's words: the bodies that are taken, and the objects that are answered.

A field that is unknown, or that asks for what is not done here, is an error: nothing is silently left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from loratune.engine import Chosen

_Zero = Literal[0] | Annotated[float, Field(ge=0, le=0)]
_Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Body):
    include_usage: bool = False


class _Asked(_Body):
    """What both kinds of completion take."""

    model: str = Field(min_length=1, max_length=256)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[Annotated[list[_Stop], Field(max_length=16)] | None, BeforeValidator(_listed)] = None
    ignore_eos: bool = False  # vLLM's word: go on to the last token that was asked for
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Taken with the values that change nothing.
    n: Literal[1] | None = None
    frequency_penalty: _Zero | None = None
    presence_penalty: _Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = None


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn; what else a template may read of it (tool calls) is kept."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None

    def plain(self) -> dict[str, Any]:
        content = self.content if not isinstance(self.content, list) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {**(self.model_extra or {}), "role": role, "content": content or ""}


class ChatBody(_Asked):
    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    tools: list[dict[str, Any]] | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TextBody(_Asked):
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [part for part in self.prompt if isinstance(part, int)]
        return [ids] if ids else [part for part in self.prompt if not isinstance(part, int)]


class LoadBody(_Body):
    lora_name: str = Field(min_length=1, max_length=200, pattern=r"^[^./\\\x00]+$")
    lora_path: str = Field(min_length=1, max_length=4096)


class UnloadBody(_Body):
    lora_name: str = Field(min_length=1, max_length=200)


# -- answers -----------------------------------------------------------------------------------------------------------


def error_of(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    # What was asked may stand in it, and half a surrogate pair has no bytes.
    plain, named = (None if text is None else text.encode("utf-8", "replace").decode() for text in (message, param))
    return {"error": {"message": plain, "type": kind, "param": named, "code": code}}


def model_of(name: str, *, parent: str | None, created: int) -> dict[str, Any]:
    """As vLLM lists them: an adapter's parent is its base."""
    return {"id": name, "object": "model", "created": created, "owned_by": "loratune", "root": name, "parent": parent}


def usage_of(prompt: int, written: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


class Told:
    """One call's answer in the words of its kind: whole, or a chunk at a time."""

    def __init__(self, model: str, ident: str, *, chat: bool) -> None:
        self.chat = chat
        prefix, kind = ("chatcmpl", "chat.completion") if chat else ("cmpl", "text_completion")
        self._head = {"id": f"{prefix}-{ident}", "created": int(time.time()), "model": model}
        self._kind = kind

    def chunk(self, index: int, text: str, finish: str | None, logprobs: Any = None) -> dict[str, Any]:
        kind = f"{self._kind}.chunk" if self.chat else self._kind
        said = {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        return self._object(kind, [{"index": index, **said, "finish_reason": finish, "logprobs": logprobs}])

    def opening(self) -> dict[str, Any]:
        """The first chunk of a chat says who speaks."""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}
        return self._object(f"{self._kind}.chunk", [choice])

    def used(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last chunk, for who asked how much was used."""
        return {**self._object(f"{self._kind}.chunk" if self.chat else self._kind, []), "usage": usage}

    def whole(self, texts: Sequence[tuple[str, str | None, Any]], usage: dict[str, int]) -> dict[str, Any]:
        choices = []
        for index, (text, finish, logprobs) in enumerate(texts):
            said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choices.append({"index": index, **said, "finish_reason": finish, "logprobs": logprobs})
        return {**self._object(self._kind, choices), "usage": usage}

    def _object(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices}


def logprobs_of(tokenizer: Any, told: Iterable[Chosen], *, chat: bool) -> dict[str, Any]:
    """Of these tokens, as the kind of call has them."""
    chosen = list(told)
    if chat:
        content = [
            {
                **_token(tokenizer, one.token, one.logprob),
                "top_logprobs": [_token(tokenizer, token, logprob) for token, logprob in one.likeliest],
            }
            for one in chosen
        ]
        return {"content": content, "refusal": None}
    words = [_word(tokenizer, one.token) for one in chosen]
    offsets = [sum(map(len, words[:place])) for place in range(len(words))]
    likeliest = [{_word(tokenizer, token): logprob for token, logprob in one.likeliest} for one in chosen]
    return {
        "tokens": words,
        "token_logprobs": [one.logprob for one in chosen],
        "top_logprobs": likeliest,
        "text_offset": offsets,
    }


def _token(tokenizer: Any, token: int, logprob: float | None) -> dict[str, Any]:
    word = _word(tokenizer, token)
    return {"token": word, "logprob": -9999.0 if logprob is None else logprob, "bytes": list(word.encode())}


def _word(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token]))
