"""Which columns make a prompt: the shapes of training rows, with or without the answer.

| shape | columns | prompt | reference |
|---|---|---|---|
| `messages` | messages, tools? | all turns but a last one of the assistant | that turn |
| `conversations` | conversations, tools? (ShareGPT) | the same | the same |
| `prompt` | prompt, completion?, tools? | a string, or messages | completion |
| `instruction` | instruction, input?, output? | instruction and input | output |
| `text` | text, label? | the whole text | label |

An answer that is null or blank is no answer. A row's `id`, a string or a whole number, stays with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratune.data.example import Example, Place
from loratune.data.messages import Message, conversation, tools
from loratune.data.shapes import (
    Shape,
    instruction_output,
    instruction_prompt,
    pair,
    prompt_completion,
    text_label,
    text_of,
)


def _messages(place: Place, row: Mapping[str, Any], problems: list[str]) -> Example:
    column = "messages" if "messages" in row else "conversations"
    return _chat(place, conversation(row[column], column, problems), row, problems)


def _prompt(place: Place, row: Mapping[str, Any], problems: list[str]) -> Example:
    if _is_given(row.get("completion")):
        return prompt_completion(place, row, problems)
    if not isinstance(row["prompt"], list | tuple):
        return pair(place, text_of(row, "prompt", problems), None, "", problems)
    messages = conversation(row["prompt"], "prompt", problems)
    if messages and messages[-1]["role"] == "assistant":
        problems.append("the prompt ends with the assistant's message: it asks for nothing")
    return _chat(place, messages, row, problems)


def _instruction(place: Place, row: Mapping[str, Any], problems: list[str]) -> Example:
    if _is_given(row.get("output")):
        return instruction_output(place, row, problems)
    return pair(place, instruction_prompt(row, problems), None, "\n\n", problems)


def _text(place: Place, row: Mapping[str, Any], problems: list[str]) -> Example:
    if _is_given(row.get("label")):
        return text_label(place, row, problems)
    return pair(place, text_of(row, "text", problems), None, "", problems)


def _chat(place: Place, messages: tuple[Message, ...], row: Mapping[str, Any], problems: list[str]) -> Example:
    if messages and messages[0]["role"] == "assistant":
        problems.append("the first message is the assistant's: it answers nothing")
    answered = bool(messages) and messages[-1]["role"] == "assistant"
    if answered:
        # Whatever training makes of it, here it is what the answer is compared with.
        reference = {key: value for key, value in messages[-1].items() if key != "weight"}
        messages = (*messages[:-1], reference)
    schemas = tools(row.get("tools"), problems)
    return Example(place, "chat", messages=messages, tools=schemas, answered=answered)


def _is_given(answer: object) -> bool:
    if isinstance(answer, str):
        return bool(answer.strip())
    return answer not in (None, [], ())


# In the order of preference of the training shapes.
PROMPT_SHAPES = (
    Shape("messages", ("messages",), ("tools", "id"), _messages),
    Shape("conversations", ("conversations",), ("tools", "id"), _messages),
    Shape("prompt", ("prompt",), ("completion", "tools", "id"), _prompt),
    Shape("instruction", ("instruction",), ("input", "output", "id"), _instruction),
    Shape("text", ("text",), ("label", "id"), _text),
)
