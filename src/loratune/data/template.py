"""The model's own chat template, and which characters of what it writes are answers.

An answer is what the template adds between "these messages, now answer" and "these messages and the answer". That is
only true if both texts are beginnings of the whole row; where they are not, the template's own `{% generation %}` marks
are asked, and without them it is refused. Nothing is searched for and nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from loratune.data.example import Example
from loratune.data.messages import answers
from loratune.data.tokens import Encoder, Spanned, Tokenizer

Loss = Literal["assistant", "completion", "all"]
Messages = list[dict[str, Any]]
Marks = Callable[[Tokenizer, Messages, list[dict[str, Any]] | None], tuple[str, list[tuple[int, int]]]]
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateFault(Exception):
    """Why a row cannot be rendered; `everywhere` where it is the template's fault rather than the row's."""

    def __init__(self, reason: str, hint: str, *, everywhere: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint
        self.everywhere = everywhere


class ChatTemplate:
    """Renders examples as text and finds their answers.

    `marks` gives the text of a conversation and the character ranges inside `{% generation %}`.
    """

    def __init__(self, encoder: Encoder, marks: Marks) -> None:
        self._encoder = encoder
        self._marks = marks
        self._tokenizer = encoder.tokenizer
        self.exists = bool(self._tokenizer.chat_template)

    def spanned(self, example: Example, loss: Loss) -> Spanned:
        """The row's text and its supervised answers.

        Raises:
            TemplateFault: the template refuses the row, its answers cannot be told apart, or it has none.
        """
        if not example.answered:
            raise _unanswered()
        if example.kind == "text":
            return Spanned(example.text, ((0, len(example.text)),), chat=False, everything=True)
        if not self.exists and example.kind == "pair":
            prompt = example.prompt + example.separator
            text = prompt + example.completion
            return Spanned(text, ((len(prompt), len(text)),), chat=False, everything=loss == "all")
        messages = self.messages(example)
        if loss == "all":
            return self._everything(messages, example)
        targets = _targets(messages)
        messages = messages[: targets[-1] + 1]
        text = self.render(messages, example)
        wanted = targets[-1:] if loss == "completion" else targets
        try:
            found = self._by_turns(text, messages, wanted, example)
        except TemplateFault as fault:
            if not fault.everywhere or not self._has_marks(example):
                raise
            found = self._by_marks(text, messages, wanted, example)
        return Spanned(text, tuple(found), chat=True)

    def prompt(self, example: Example) -> tuple[str, str]:
        """What stands before the last answer, with the header that asks for it, and that answer.

        An answer that is only tool calls is given as the template writes it, with its end-of-turn token. A row without
        an answer is all prompt, and the answer is empty.
        """
        messages = self.messages(example)
        if not example.answered:
            return self.render(messages, example, ask=True), ""
        last = _targets(messages)[-1]
        before = self.render(messages[:last], example, ask=True)
        answer = str(messages[last]["content"])
        if not answer.strip():
            answer = self.render(messages[: last + 1], example).removeprefix(before).strip()
        return before, answer

    def messages(self, example: Example) -> Messages:
        if not self.exists:
            raise TemplateFault(
                "the tokenizer has no chat template, so a conversation cannot be written as text",
                "use an instruct model, set tokenizer.chat_template, or give prompt and completion",
                everywhere=True,
            )
        if example.kind == "pair":
            question = {"role": "user", "content": example.prompt}
            answer = {"role": "assistant", "content": example.completion}
            return [question, answer] if example.answered else [question]
        return [dict(message) for message in example.messages]

    def render(self, messages: Messages, example: Example, *, ask: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                _said(messages), tools=_tools(example), tokenize=False, add_generation_prompt=ask
            )
        except Exception as error:  # noqa: BLE001 - a template is foreign code and raises what it likes
            raise TemplateFault(
                f"the chat template refuses the row: {error}",
                "change the row to what the model expects",
                everywhere=False,
            ) from None
        return str(text)

    def _everything(self, messages: Messages, example: Example) -> Spanned:
        text = self.render(messages, example)
        ended = len(text.rstrip())
        is_answer = messages[-1]["role"] == "assistant"
        return Spanned(text, ((0, ended),) if is_answer else (), chat=True, everything=True)

    def _by_turns(
        self, text: str, messages: Messages, wanted: Sequence[int], example: Example
    ) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for index in wanted:
            before = self.render(messages[:index], example, ask=True)
            # White space after the end of a turn is the template's, and may come only with the next turn.
            until = text if index == len(messages) - 1 else self.render(messages[: index + 1], example)
            until = until.rstrip()
            follows = not found or found[-1][1] <= len(before)
            if not (text.startswith(before) and text.startswith(until) and follows and len(until) > len(before)):
                raise _unmaskable(index, wanted)
            _check_kept(text[len(before) : len(until)], messages[index])
            found.append((len(before), len(until)))
        return found

    def _by_marks(
        self, text: str, messages: Messages, wanted: Sequence[int], example: Example
    ) -> list[tuple[int, int]]:
        written, marks = self._marks(self._tokenizer, _said(messages), _tools(example))
        if written != text:
            raise _unmaskable(wanted[0], wanted)
        spans = [(start, self._ended(text, end)) for start, end in marks]
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) != len(turns):
            raise TemplateFault(
                f"the chat template marks {len(spans)} of {len(turns)} answers with {{% generation %}}",
                "use --loss completion, or a template that marks every answer",
                everywhere=True,
            )
        by_turn = dict(zip(turns, spans, strict=True))
        for index in wanted:
            _check_kept(text[slice(*by_turn[index])], messages[index])
        return [by_turn[index] for index in wanted]

    def _ended(self, text: str, end: int) -> int:
        """`end` without white space, and after the end-of-turn token where the mark stops right before one."""
        tokens = self._encoder.special.values()
        bare = len(text[:end].rstrip())
        if any(text.endswith(token, 0, bare) for token in tokens):
            return bare
        return next((end + len(token) for token in tokens if text.startswith(token, end)), bare)

    def _has_marks(self, example: Example) -> bool:
        template = self._tokenizer.chat_template
        texts = template.values() if isinstance(template, Mapping) else [template]
        return any(_MARKS.search(str(text)) for text in texts) and example.kind != "text"


def _targets(messages: Messages) -> list[int]:
    found = answers(messages)
    if not found:
        raise _unanswered()
    return found


def _unanswered() -> TemplateFault:
    return TemplateFault("row without an answer", "remove the row: it teaches nothing", everywhere=False)


def _said(messages: Messages) -> Messages:
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def _tools(example: Example) -> list[dict[str, Any]] | None:
    return [dict(tool) for tool in example.tools] if example.tools else None


def _check_kept(written: str, message: Mapping[str, Any]) -> None:
    """Templates that drop reasoning would silently teach something else than the row says."""
    content = str(message["content"])
    if content.strip() not in written and "".join(content.split()) not in "".join(written.split()):
        raise TemplateFault(
            "the chat template leaves out or changes a part of the answer",
            "give the answer as this template writes it (some drop what stands before </think>)",
            everywhere=False,
        )


def _unmaskable(index: int, wanted: Sequence[int]) -> TemplateFault:
    if index != wanted[-1]:
        reason = "it writes an earlier answer differently once other turns follow"
        hint = "use --loss completion to learn the last answer only, or a template with {% generation %} marks"
    else:
        reason = "what it writes before an answer is no beginning of what it writes with the answer"
        hint = "use a template with {% generation %} marks"
    return TemplateFault(f"the chat template cannot be masked: {reason}", hint, everywhere=True)
