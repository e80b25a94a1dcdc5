"""The loop of `loratune chat`: on a terminal a prompt, and answers as they are written; plain lines in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel

from loratune.cli.output import stderr, stdout, write, write_json
from loratune.engine import Answer
from loratune.errors import DataError
from loratune.run.conversation import Conversation


def converse(conversation: Conversation, *, as_json: bool) -> None:
    """Answer line after line until the input ends or says /quit; /new forgets what was said."""
    console = stdout()
    terminal = sys.stdin.isatty()
    if terminal:
        stderr().print("[dim]/new starts over, /quit or Ctrl-D ends[/]")
    while True:
        try:
            message = input("› " if terminal else "").strip()
        except EOFError:
            return
        if message == "/quit":
            return
        if message == "/new":
            conversation.forget()
        elif message:
            try:
                _answer(conversation, message, console, as_json=as_json)
            except DataError as error:
                if not terminal:  # whoever reads a pipe must know that an answer is missing
                    raise
                stderr().print(f"{escape(str(error))}\n[dim]/new starts over[/]")


def _answer(conversation: Conversation, message: str, console: Console, *, as_json: bool) -> None:
    if as_json:
        write_json(_as_json(message, conversation.say(message)), indent=None)
    elif len(conversation.speakers) == 1:
        conversation.say(message, lambda _, piece: write(piece))
        write("\n")
    else:
        _beside(conversation, message, console)


def _beside(conversation: Conversation, message: str, console: Console) -> None:
    """Both answers side by side, growing where the console can be written over."""
    said = [(speaker.name, "", "…") for speaker in conversation.speakers]
    with Live(_panels(said), console=console, auto_refresh=False, transient=True) as live:

        def hear(place: int, piece: str) -> None:
            name, before, note = said[place]
            said[place] = (name, before + piece, note)
            if console.is_terminal:
                live.update(_panels(said), refresh=True)

        answers = conversation.say(message, hear)
    console.print(_panels([(name, answer.text, _note(answer)) for name, answer in answers]))


def _panels(said: Sequence[tuple[str, str, str]]) -> Columns:
    """Of each speaker's name, its text, and a note on it."""
    panels = [
        Panel(escape(text), title=escape(name), subtitle=f"[dim]{note}[/]", title_align="left")
        for name, text, note in said
    ]
    return Columns(panels, equal=True, expand=True)


def _note(answer: Answer) -> str:
    count = len(answer.ids)
    return f"{count} token{'' if count == 1 else 's'}" + ("" if answer.stopped else ", cut off")


def _as_json(message: str, answers: list[tuple[str, Answer]]) -> dict[str, object]:
    return {
        "message": message,
        "answers": [{"from": n, "text": a.text, "tokens": len(a.ids), "stopped": a.stopped} for n, a in answers],
    }
