"""What is trained on: token ids and masks, made once and written to a file that every side reads.

dense           4 rows of 256 tokens a step, all supervised
chats           short function-calling chats of the demo's data, 8 a step
live_multiple   chats with the full JSON schemas of the functions in the system prompt, 8 a step, peers 2 × 4
shared_prefix   one system prompt of about 1000 tokens before chats of about 100, 16 a step, peers 2 × 8

Steps that do not count come first, of short chats where rows are long: they warm the machine for less.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from job import Row, Workload

from loratune.data.read import read
from loratune.data.render import render

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "function_calling"
WARM_STEPS = 2
CONTEXT = 8192
LENGTH, PREFIX_TOKENS = 256, 1000

Messages = list[dict[str, str]]


def dense(tokenizer: Any, steps: int, length: int = LENGTH) -> Workload:
    """Real text, cut into rows without regard to its turns."""
    count = 4 * (WARM_STEPS + steps)
    ids = [token for row in rendered(demo_chats(), tokenizer) for token in row.ids]
    while len(ids) < count * length:
        ids = ids + ids
    slices = [ids[begin : begin + length] for begin in range(0, count * length, length)]
    rows = [Row(part, [False] + [True] * (length - 1)) for part in slices]
    name = "dense" if length == LENGTH else f"dense_{length}"
    return Workload(name, 4, 4, rows[: 4 * WARM_STEPS], rows[4 * WARM_STEPS :])


def chats(tokenizer: Any, steps: int) -> Workload:
    rows = rendered(demo_chats(), tokenizer)
    warm, rest = rows[: 8 * WARM_STEPS], rows[8 * WARM_STEPS :]
    return Workload("chats", 8, 8, warm, _first(rest, 8 * steps))


def live_multiple(tokenizer: Any, steps: int) -> Workload:
    """Whole groups of rows with the same functions, drawn at random, then mixed: as much is shared as in all rows."""
    dice = random.Random(0)
    groups: dict[str, list[Messages]] = {}
    for messages in live_chats():
        groups.setdefault(messages[0]["content"], []).append(messages)
    drawn = list(groups.values())
    dice.shuffle(drawn)
    everything = [messages for group in drawn for messages in group]
    chosen = _first(everything, 8 * steps)
    dice.shuffle(chosen)
    warm = demo_chats()[: 8 * WARM_STEPS]
    return Workload("live_multiple", 8, 2, rendered(warm, tokenizer), rendered(chosen, tokenizer))


def shared_prefix(tokenizer: Any, steps: int, rows: int = 500) -> Workload:
    count = min(rows, 16 * steps) if steps else rows
    system = _system_prompt(tokenizer)
    under_it = [[{"role": "system", "content": system}, *messages[1:]] for messages in demo_chats()]
    warm = demo_chats()[: 16 * WARM_STEPS]
    return Workload("shared_prefix", 16, 2, rendered(warm, tokenizer), rendered(under_it[:count], tokenizer))


def of_length(rows: int, length: int, vocabulary: int) -> Workload:
    """One step of random ids, the last eighth of each row supervised, before it one like it that does not count."""
    dice = random.Random(0)
    mask = [i >= length - length // 8 for i in range(length)]
    made = [Row([dice.randrange(3, vocabulary) for _ in range(length)], mask) for _ in range(2 * rows)]
    return Workload("random", rows, rows, made[:rows], made[rows:])


def _first(rows: Sequence[Any], count: int) -> list[Any]:
    """The first `count`, or all where it is 0."""
    return list(rows[:count] if count else rows)


def rendered(conversations: Sequence[Messages], tokenizer: Any) -> list[Row]:
    """Ids and masks as training has them: the answers are learned."""
    corpus = read([{"messages": messages} for messages in conversations])
    made = render(corpus.examples, tokenizer, loss="assistant", max_length=CONTEXT)
    return [Row(list(row.ids), list(row.supervised)) for row in made.rows]


@cache
def demo_chats() -> list[Messages]:
    """The demo's chats (simple and multiple Python functions) in random order, none longer than in the demo."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        from chat import messages
        from prepare import estimated_tokens
        from questions import read_questions
    finally:
        sys.path.remove(str(EXAMPLE))
    found = [messages(question) for question in read_questions() if estimated_tokens(question) <= 130]
    random.Random(0).shuffle(found)
    return found


@cache
def live_chats() -> list[Messages]:
    """`live_multiple` of the function-calling leaderboard, each question with the whole schemas of its functions."""
    folder = _data_folder()
    name = "BFCL_v4_live_multiple.json"
    answers = {row["id"]: row["ground_truth"] for row in _lines(folder / "possible_answer" / name)}
    return [_live(row, answers[row["id"]]) for row in _lines(folder / name) if row["id"] in answers]


def _live(row: Mapping[str, Any], ground_truth: list[dict[str, dict[str, list[Any]]]]) -> Messages:
    ((name, values),) = ground_truth[0].items()
    (turn,) = row["question"]
    call = {"name": name, "arguments": _taken(values)}
    return [
        {"role": "system", "content": _offer(row["function"])},
        {"role": "user", "content": "\n".join(message["content"].strip() for message in turn)},
        {"role": "assistant", "content": json.dumps(call, ensure_ascii=False)},
    ]


def _taken(values: Mapping[str, list[Any]]) -> dict[str, Any]:
    """The first accepted value of each argument; one that may be left out is."""
    found = {}
    for key, accepted in values.items():
        first = accepted[0] if isinstance(accepted, list) and accepted else accepted
        if first != "":
            found[key] = _taken(first) if isinstance(first, dict) else first
    return found


def _offer(functions: Sequence[Mapping[str, Any]]) -> str:
    schemas = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    return f"Answer with one JSON function call. The functions:\n{schemas}"


def _system_prompt(tokenizer: Any) -> str:
    """The schemas of real functions, as many as make about 1000 tokens."""
    schemas: list[Mapping[str, Any]] = []
    for row in _lines(_data_folder() / "BFCL_v4_live_multiple.json"):
        more = [function for function in row["function"] if function not in schemas]
        for function in more:
            if len(tokenizer(_offer([*schemas, function])).input_ids) <= PREFIX_TOKENS:
                schemas.append(function)
        if len(tokenizer(_offer(schemas)).input_ids) > 0.95 * PREFIX_TOKENS:
            break
    return _offer(schemas)


def _data_folder() -> Path:
    sys.path.insert(0, str(EXAMPLE))
    try:
        from questions import data_folder
    finally:
        sys.path.remove(str(EXAMPLE))
    folder: Path = data_folder()
    return folder


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]
