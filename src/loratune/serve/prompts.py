"""What is asked, as tokens. A large prompt takes a while: nothing here belongs on the event loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loratune.errors import DataError
from loratune.serve.wire import ChatBody


def chat_prompt(tokenizer: Any, body: ChatBody) -> list[tuple[int, ...]]:
    """The conversation by the model's own template."""
    if tokenizer.chat_template is None:
        raise DataError("this model has no chat template", hint="POST /v1/completions continues plain text")
    messages = [message.plain() for message in body.messages]
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=body.tools_offered, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # noqa: BLE001 - templates raise what they like at messages that they do not take
        raise DataError(f"the chat template refuses these messages: {str(error)[:200]}") from None
    return [_ids(tokenizer, text, add_special_tokens=False)]


def text_prompts(tokenizer: Any, prompts: Sequence[str | list[int]]) -> list[tuple[int, ...]]:
    """Each of them; those that are token ids already are looked over."""
    count = len(tokenizer)
    found = []
    for prompt in prompts:
        if isinstance(prompt, str):
            found.append(_ids(tokenizer, prompt))
            continue
        wrong = next((token for token in prompt if not 0 <= token < count), None)
        if wrong is not None:
            raise DataError(f"no token has the number {wrong}", hint=f"they are 0 to {count - 1}")
        found.append(tuple(prompt))
    return found


def _ids(tokenizer: Any, text: str, **how: Any) -> tuple[int, ...]:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError("the text holds half a surrogate pair, which is no character") from None
    return tuple(tokenizer(text, **how)["input_ids"])
