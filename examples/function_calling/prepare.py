"""Turns the single-turn sets of the Berkeley Function Calling Leaderboard into chats to train on and to test on.

    python prepare.py --out data --train-tokens 35000 --heldout-rows 50

Writes three files into the folder: `train.jsonl` and `heldout.jsonl` (rows with `id` and `messages`) and
`heldout_answers.jsonl` (for each held-out id, every accepted call). The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chat import messages
from questions import Question, read_questions

HELDOUT_SHARE = 0.3  # of the groups of functions that occur together
# Fitted to the tokenizer of SmolLM2 on these rows (within 8% for nine rows in ten): words have about six letters a
# token, while a digit or a mark is a token of its own. The chat template adds the rest.
TOKENS_PER_LETTER = 0.17
TOKENS_PER_MARK = 1.1
TEMPLATE_TOKENS = 12


@dataclass(frozen=True)
class Split:
    """Questions on either side; no function of one side, not even one offered in vain, occurs on the other."""

    train: list[Question]
    heldout: list[Question]


def split(questions: Sequence[Question], seed: int = 0) -> Split:
    """Divide whole groups of functions by a hash of their name, so that what else is in the list changes nothing."""
    groups = _groups(questions)
    largest = max(groups, key=lambda name: (len(groups[name]), name))
    train: list[Question] = []
    heldout: list[Question] = []
    for name, members in groups.items():
        # Distractors chain a third of all rows into one group: held out, it would leave too little to learn from.
        is_heldout = name != largest and _fraction(seed, name) < HELDOUT_SHARE
        (heldout if is_heldout else train).extend(members)
    return Split(_spread(train, seed), _spread(heldout, seed))


def choose(
    sides: Split, *, train_tokens: int | None = None, heldout_rows: int | None = None, max_tokens: int | None = None
) -> Split:
    """The first questions of each side up to the budgets, without those estimated longer than `max_tokens`."""
    train, heldout = (
        [question for question in side if max_tokens is None or estimated_tokens(question) <= max_tokens]
        for side in (sides.train, sides.heldout)
    )
    if train_tokens is not None:
        spent = 0
        for count, question in enumerate(train):
            spent += estimated_tokens(question)
            if spent > train_tokens:
                train = train[:count]
                break
    return Split(train, heldout[:heldout_rows])


def estimated_tokens(question: Question) -> int:
    """About how many tokens the rendered chat has; no tokenizer is loaded for it."""
    text = "".join("".join(message["content"].split()) for message in messages(question))
    letters = sum(character.isascii() and character.isalpha() for character in text)
    return round(TEMPLATE_TOKENS + TOKENS_PER_LETTER * letters + TOKENS_PER_MARK * (len(text) - letters))


def write(chosen: Split, out: Path) -> None:
    """Write the three files.

    The accepted calls have a file of their own because a column whose lists mix types (`[25.0, ""]`) cannot be read
    by readers that give each column one type.
    """
    out.mkdir(parents=True, exist_ok=True)
    _write_lines(out / "train.jsonl", map(_row, chosen.train))
    _write_lines(out / "heldout.jsonl", map(_row, chosen.heldout))
    answers = ({"id": question.id, **question.accepted.to_row()} for question in chosen.heldout)
    _write_lines(out / "heldout_answers.jsonl", answers)


def _row(question: Question) -> dict[str, Any]:
    return {"id": question.id, "messages": messages(question)}


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _groups(questions: Sequence[Question]) -> dict[str, list[Question]]:
    """Questions connected by a function name or by the same text, under the group's alphabetically first key."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    for question in questions:
        first, *others = map(root, _keys(question))
        for other in others:
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(root(_keys(question)[0]), []).append(question)
    return groups


def _keys(question: Question) -> list[str]:
    # Spelled alike is the same function: `math.gcd` and `math_gcd` must not face each other across the split.
    names = [re.sub(r"[^a-z0-9]", "", function["name"].lower()) for function in question.functions]
    return [*names, "text:" + " ".join(question.text.lower().split())]


def _spread(questions: Sequence[Question], seed: int) -> list[Question]:
    """A shuffle in which every function has its first question before any has its second."""
    seen: dict[str, int] = {}
    ranked = []
    for question in sorted(questions, key=lambda question: _fraction(seed, question.id)):
        rank = seen[question.accepted.name] = seen.get(question.accepted.name, -1) + 1
        ranked.append((rank, question))
    return [question for _, question in sorted(ranked, key=lambda pair: pair[0])]


def _fraction(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on the seed and the key alone."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, write the files, say what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("data"), metavar="DIR", help="folder to write (%(default)s)")
    parser.add_argument("--train-tokens", type=int, metavar="N", help="about how many tokens to train on (all)")
    parser.add_argument("--heldout-rows", type=int, metavar="N", help="how many rows to test on (all)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="leave out rows of more tokens, on both sides")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the order (%(default)s)")
    given = parser.parse_args(arguments)
    chosen = choose(
        split(read_questions(), given.seed),
        train_tokens=given.train_tokens,
        heldout_rows=given.heldout_rows,
        max_tokens=given.max_tokens,
    )
    write(chosen, given.out)
    tokens = sum(map(estimated_tokens, chosen.train))
    print(f"{given.out}: {len(chosen.train)} rows to train on (about {tokens} tokens), {len(chosen.heldout)} held out")


if __name__ == "__main__":
    main()
