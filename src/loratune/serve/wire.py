"""What is said over the wire, in OpenAI's words: the bodies that are taken, and the objects that are answered.

A field that is unknown, or that asks for what is not done here, is an error: nothing is silently left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, StringConstraints, model_validator

_Zero = Literal[0] | Annotated[float, Field(ge=0, le=0)]
_Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
_Word = Annotated[str, StringConstraints(max_length=512)]
# Lists end with the first wrong item: a million wrong ones would be a million sentences.
_Ids = Annotated[list[StrictInt], Field(fail_fast=True, max_length=1 << 20)]
_Texts = Annotated[list[str], Field(fail_fast=True, max_length=4096)]
_IdLists = Annotated[list[_Ids], Field(fail_fast=True, max_length=4096)]


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, given: Any) -> Any:
        """OpenAI's clients send null for what they do not set."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None or name not in cls.model_fields}


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class TextFormat(_Body):
    type: Literal["text"]


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
    n: Literal[1] = 1
    frequency_penalty: _Zero = 0
    presence_penalty: _Zero = 0
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] = {}
    # They say who asks and what is kept of it, and nothing is kept here.
    user: _Word | None = None
    safety_identifier: _Word | None = None
    prompt_cache_key: _Word | None = None
    store: bool = False
    metadata: Annotated[dict[str, _Word], Field(max_length=16)] = {}
    service_tier: Literal["auto", "default"] = "auto"


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn; what else a template may read of it (tool calls) is kept."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=1024)] | None = None

    def plain(self) -> dict[str, Any]:
        content = self.content if not isinstance(self.content, list) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {**(self.model_extra or {}), "role": role, "content": content or ""}


class ChatBody(_Asked):
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=4096)]
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=128)] | None = None
    # What a model writes is told as text; none is made to call a tool.
    tool_choice: Literal["auto", "none"] = "auto"
    parallel_tool_calls: bool = True
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _alternatives_are_probabilities(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs: true")
        return self

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def tools_offered(self) -> list[dict[str, Any]] | None:
        return None if self.tool_choice == "none" else self.tools


class TextBody(_Asked):
    prompt: str | _Ids | _Texts | _IdLists
    max_tokens: int = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: Literal[False] = False
    suffix: Literal[""] = ""
    best_of: Literal[1] = 1

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
