"""The loop of `loratune chat`: a prompt on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys

from rich.columns import Columns
from rich.markup import escape
from rich.panel import Panel

from loratune.cli.output import stderr, stdout, write_json
from loratune.engine import Answer
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
            answers = conversation.say(message)
            if as_json:
                write_json(_as_json(message, answers), indent=None)
            elif len(answers) == 1:
                console.print(escape(answers[0][1].text))
            else:
                console.print(Columns([_panel(*a) for a in answers], equal=True, expand=True))


def _panel(name: str, answer: Answer) -> Panel:
    note = f"{len(answer.ids)} tokens" + ("" if answer.stopped else ", cut off")
    return Panel(escape(answer.text), title=escape(name), subtitle=f"[dim]{note}[/]", title_align="left")


def _as_json(message: str, answers: list[tuple[str, Answer]]) -> dict[str, object]:
    return {
        "message": message,
        "answers": [{"from": n, "text": a.text, "tokens": len(a.ids), "stopped": a.stopped} for n, a in answers],
    }
