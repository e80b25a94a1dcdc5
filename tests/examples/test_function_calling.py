"""The function-calling example: its split leaks nothing, its scorer tells right calls from wrong ones."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import chat
import prepare
import pytest
import questions
import score
from accepted import LEFT_OUT, Accepted, Argument
from compare import is_accepted
from questions import Question

DRAWS = 20  # accepted combinations drawn for each question
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def every() -> list[Question]:
    """All questions; a missing data package is a failure here, not a skip."""
    return questions.read_questions()


def gold(question: Question) -> str:
    return chat.messages(question)[-1]["content"]


def call(name: str, /, **arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments})


def argument(kind: str, *values: Any, items: str | None = None, required: bool = True) -> Argument:
    return Argument(kind, items, required, values)


BOOKING = Accepted(
    "hotel.book",
    {
        "city": argument("string", "New York", "New York, NY"),
        "nights": argument("integer", 3),
        "budget": argument("float", 200.0, LEFT_OUT, required=False),
        "room": argument("string", "single", required=False),
    },
)
RIGHT: dict[str, Any] = {"city": "New York", "nights": 3, "budget": 200.0, "room": "single"}


# The questions and the split.


def test_questions_are_all_there(every: list[Question]) -> None:
    # 400 + 200 + 258, less the two for which no call can be right.
    assert len(every) == 856
    assert len({question.id for question in every}) == len(every)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_function_and_no_text_is_on_both_sides(every: list[Question], seed: int) -> None:
    sides = prepare.split(every, seed)
    names = [
        {function["name"].lower() for q in side for function in q.functions} for side in (sides.train, sides.heldout)
    ]
    texts = [{" ".join(q.text.lower().split()) for q in side} for side in (sides.train, sides.heldout)]
    assert not names[0] & names[1]
    assert not texts[0] & texts[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_question_is_on_one_side(every: list[Question], seed: int) -> None:
    sides = prepare.split(every, seed)
    ids = [question.id for question in [*sides.train, *sides.heldout]]
    assert sorted(ids) == sorted(question.id for question in every)
    assert 0.1 < len(sides.heldout) / len(every) < 0.3


def test_a_side_does_not_depend_on_the_other_questions(every: list[Question]) -> None:
    whole = {question.id for question in prepare.split(every).heldout}
    chained = {question.id for question in max(prepare._groups(every).values(), key=len)}
    others = [question for question in every if question.id.startswith("live") or question.id in chained]
    kept = {question.id for question in others}
    groups = [{q.id for q in members} for members in prepare._groups(every).values()]
    part = {question.id for question in prepare.split(others).heldout}
    # Groups that lost none of their questions stay where they were.
    untouched = set().union(*(group for group in groups if group <= kept))
    assert untouched
    assert part & untouched == whole & untouched


def test_budgets_bound_the_subset(every: list[Question]) -> None:
    sides = prepare.split(every)
    chosen = prepare.choose(sides, train_tokens=5000, heldout_rows=7, max_tokens=120)
    assert len(chosen.heldout) == 7
    lengths = [prepare.estimated_tokens(question) for question in [*chosen.train, *chosen.heldout]]
    assert max(lengths) <= 120
    assert 4800 < sum(map(prepare.estimated_tokens, chosen.train)) <= 5000
    # A smaller budget is the beginning of a larger one.
    assert chosen.train == prepare.choose(sides, train_tokens=9000, max_tokens=120).train[: len(chosen.train)]


def test_the_subset_has_every_function_once_before_any_twice(every: list[Question]) -> None:
    train = prepare.split(every).train
    names = [question.accepted.name for question in train]
    distinct = len(set(names))
    assert len(set(names[:distinct])) == distinct


# The files.


def test_the_same_arguments_write_the_same_bytes(tmp_path: Path) -> None:
    def files(name: str, seed: int) -> dict[str, bytes]:
        prepare.main(["--out", str(tmp_path / name), "--heldout-rows", "20", "--seed", str(seed)])
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    first = files("first", 0)
    assert set(first) == {"train.jsonl", "heldout.jsonl", "heldout_answers.jsonl"}
    assert files("second", 0) == first
    assert files("third", 1) != first


def test_rows_are_chats_of_one_call(every: list[Question]) -> None:
    for question in every:
        system, user, assistant = chat.messages(question)
        assert [system["role"], user["role"], assistant["role"]] == ["system", "user", "assistant"]
        assert question.text in user["content"]
        assert all(f"{function['name']} {{" in user["content"] for function in question.functions)
        assert "\n" not in assistant["content"]


def test_a_signature_is_one_compact_line() -> None:
    function = {
        "name": "weather",
        "description": "Tells the weather. At length.",
        "parameters": {
            "type": "dict",
            "required": ["place", "days"],
            "properties": {
                "place": {"type": "string", "description": "The place, in the format of 'City, State'."},
                "days": {"type": "array", "items": {"type": "integer"}},
                "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
                "area": {"type": "dict", "properties": {"width": {"type": "float"}}},
                "terse": {"type": "boolean", "default": None},
            },
        },
    }
    line = (
        'weather {"place": str (City, State), "days": list[int], "unit": "C"|"F" = "C",'
        ' "area"?: {"width": float}, "terse"?: bool}'
    )
    assert chat.signature(function, described=False) == line
    assert chat.signature(function, described=True) == f"{line} # Tells the weather"


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("New York for 3 nights", {"city": "New York", "nights": 3, "room": "single"}),
        (
            "New York, NY for 3 nights, at most $200",
            {"city": "New York", "nights": 3, "budget": 200.0, "room": "single"},
        ),
        ("A place called Big Apple, 1200 or 200.5", {"city": "New York", "nights": 3, "room": "single"}),
    ],
)
def test_an_optional_argument_is_given_when_its_value_is_stated(question: str, expected: dict[str, Any]) -> None:
    assert json.loads(chat.answer(BOOKING, question)) == {"name": "hotel.book", "arguments": expected}


def test_a_missing_data_package_is_an_error_that_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="pip install --no-deps bfcl-eval"):
        questions.data_folder()


# The scorer on right calls.


def test_our_own_answers_are_all_exact(every: list[Question]) -> None:
    result = score.score([gold(question) for question in every], [question.accepted for question in every])
    assert result == score.Score(len(every), valid=1.0, name=1.0, exact=1.0)


def test_accepted_calls_survive_the_file(every: list[Question]) -> None:
    for question in every:
        assert Accepted.from_row(json.loads(json.dumps(question.accepted.to_row()))) == question.accepted


def test_every_combination_of_accepted_values_is_exact(every: list[Question]) -> None:
    draw = random.Random(0)
    for question in every:
        for _ in range(DRAWS):
            arguments = {}
            for key, expected in question.accepted.arguments.items():
                # A required argument is never left out, though some accept the mark; nothing else may stand there.
                values = [value for value in expected.values if expected.optional or value != LEFT_OUT] or [LEFT_OUT]
                value = draw.choice(values)
                if not (expected.optional and value == LEFT_OUT):
                    arguments[key] = _drawn(draw, value)
            verdict = score.judge(call(question.accepted.name, **arguments), question.accepted)
            assert verdict.exact, (question.id, verdict.reason)


def _drawn(draw: random.Random, value: Any) -> Any:
    if isinstance(value, dict):
        chosen = {key: draw.choice(choices) for key, choices in value.items()}
        return {key: item for key, item in chosen.items() if item != LEFT_OUT}
    return [_drawn(draw, item) for item in value] if isinstance(value, list) else value


# The scorer on wrong calls.


def test_the_planted_call_is_right_before_anything_is_planted() -> None:
    assert score.judge(call("hotel.book", **RIGHT), BOOKING).exact


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"nights": "3"}, "'nights' is '3'"),
        ({"nights": 3.0}, "'nights' is 3.0"),
        ({"nights": True}, "'nights' is True"),
        ({"nights": 4}, "'nights' is 4"),
        ({"city": ["New York"]}, "'city' is"),
        ({"city": "Boston"}, "'city' is 'Boston'"),
        ({"city": None}, "'city' is None"),
        ({"budget": 201}, "'budget' is 201"),
        ({"pets": True}, "'pets' is unknown"),
    ],
)
def test_a_planted_wrong_argument_is_found(changes: dict[str, Any], reason: str) -> None:
    verdict = score.judge(call("hotel.book", **RIGHT | changes), BOOKING)
    assert verdict.valid
    assert verdict.name
    assert not verdict.exact
    assert verdict.reason is not None
    assert reason in verdict.reason


@pytest.mark.parametrize("key", ["city", "nights", "room"])
def test_an_argument_that_has_to_be_there_is_missed(key: str) -> None:
    rest = {name: value for name, value in RIGHT.items() if name != key}
    assert score.judge(call("hotel.book", **rest), BOOKING).reason == f"argument {key!r} is missing"


def test_an_argument_that_may_be_left_out_is_not_missed() -> None:
    rest = {name: value for name, value in RIGHT.items() if name != "budget"}
    assert score.judge(call("hotel.book", **rest), BOOKING).exact


def test_a_wrong_name_is_valid_and_no_more() -> None:
    verdict = score.judge(call("hotel.find", **RIGHT), BOOKING)
    assert (verdict.valid, verdict.name, verdict.exact) == (True, False, False)


@pytest.mark.parametrize(
    "wrap",
    [
        "Sure: {}",
        "{} Anything else?",
        "```json\n{}\n```",
        "[{}]",
        "{}{}",
        '"{}"',
    ],
)
def test_text_around_the_call_is_not_valid(wrap: str) -> None:
    right = call("hotel.book", **RIGHT)
    assert score.judge(wrap.replace("{}", right), BOOKING) == score.judge("", BOOKING)
    assert score.judge(f" {right}\n", BOOKING).exact


@pytest.mark.parametrize(
    "output",
    [
        "",
        "{}",
        "null",
        '{"name": "f"}',
        '{"name": "f", "arguments": []}',
        '{"name": 1, "arguments": {}}',
        '{"name": "f", "arguments": {}, "id": 1}',
        '{"name": "f", "arguments": {"a": NaN}}',
        "{'name': 'f', 'arguments': {}}",
        "[" * 100_000,
    ],
)
def test_what_is_not_one_call_is_not_valid(output: str) -> None:
    assert score.parse_call(output) is None


def test_gold_answers_of_other_questions_score_nothing(every: list[Question]) -> None:
    apart = [(a, b) for a, b in pairwise(every) if a.accepted.name != b.accepted.name]
    result = score.score([gold(a) for a, _ in apart], [b.accepted for _, b in apart])
    assert result.valid == 1.0
    assert result.name == result.exact == 0.0


# How values are compared.


@pytest.mark.parametrize(
    ("value", "expected", "right"),
    [
        ("new york ny", argument("string", "New York, NY"), True),
        ("it's", argument("string", 'it"s'), True),
        ("New York!", argument("string", "New York"), False),
        ("", argument("string", "x", LEFT_OUT), True),
        (5, argument("float", 5.0), True),
        (5.0, argument("float", 5), True),
        (5.0, argument("integer", 5), False),
        (1, argument("boolean", True), False),
        (None, argument("string", LEFT_OUT, None), True),
        (None, argument("string", "x"), False),
        (["a ", "B"], argument("array", ["A", "b"], items="string"), True),
        (["b", "a"], argument("array", ["a", "b"], items="string"), False),
        (["a"], argument("array", ["a", "b"], items="string"), False),
        ([1, 2], argument("array", [1.0, 2.0], items="float"), False),
        ([1, 2], argument("array", [1, 2], items="float"), True),
        ([], argument("array", [1], LEFT_OUT, items="integer"), True),
        ([], argument("array", [1], items="integer"), False),
        ([[1], [2]], argument("array", [[1], [2]], items="array"), True),
        ([1.5, 2.5], argument("tuple", [1.5, 2.5], items="float"), True),
        ({"a": "X", "b": 2}, argument("dict", {"a": ["x"], "b": [1, 2]}), True),
        ({"a": "x"}, argument("dict", {"a": ["x"], "b": [1, LEFT_OUT]}), True),
        ({"a": "x"}, argument("dict", {"a": ["x"], "b": [1]}), False),
        ({"a": "x", "c": 1}, argument("dict", {"a": ["x"]}), False),
        ([{"a": 1}], argument("array", [{"a": [1, 2]}], items="dict"), True),
        ([{"a": 3}], argument("array", [{"a": [1, 2]}], items="dict"), False),
        ([{"a": 1}, {"a": 1}], argument("array", [{"a": [1, 2]}], items="dict"), False),
    ],
)
def test_values_compare_by_the_rules_of_the_leaderboard(value: Any, expected: Argument, right: bool) -> None:
    assert is_accepted(value, expected) is right


# The files and the command.


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def scored(every: list[Question], tmp_path: Path) -> tuple[Path, list[dict[str, Any]]]:
    """An answers file of three questions, and generations that are right for the first two of them."""
    chosen = prepare.choose(prepare.split(every), heldout_rows=3)
    prepare.write(chosen, tmp_path)
    rows = [{"id": question.id, "output": gold(question)} for question in chosen.heldout]
    rows[2]["output"] += "."
    return tmp_path / "heldout_answers.jsonl", rows


def test_rows_pair_by_id_or_by_position(scored: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    answers, rows = scored
    for generated in (rows[::-1], [{"prompt": "p", "output": row["output"]} for row in rows]):
        outputs, accepted = score.read_pairs(write_lines(tmp_path / "generated.jsonl", generated), answers)
        result = score.score(outputs, accepted)
        assert (result.rows, result.valid, result.exact) == (3, 2 / 3, 2 / 3)


def test_generations_that_do_not_fit_are_refused(scored: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    answers, rows = scored
    without_ids = [{"output": row["output"]} for row in rows]
    for generated, reason in [
        (rows[:2], "ids"),
        ([*rows, rows[0]], "ids"),
        (without_ids[:2], "2 rows"),
        ([{"id": row["id"]} for row in rows], "rows 1, 2, 3"),
    ]:
        with pytest.raises(SystemExit, match=reason):
            score.read_pairs(write_lines(tmp_path / "generated.jsonl", generated), answers)


def test_nothing_scores_nothing() -> None:
    with pytest.raises(ValueError, match="no rows"):
        score.score([], [])


def test_the_command_prints_a_table_or_json(scored: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    answers, rows = scored
    generated = write_lines(tmp_path / "generated.jsonl", rows)

    def printed(*options: str) -> str:
        command = [sys.executable, str(Path(score.__file__)), str(generated), str(answers), *options]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert printed().split() == ["rows", "valid", "name", "exact", "3", "66.7%", "66.7%", "66.7%"]
    assert json.loads(printed("--json")) == {"rows": 3, "valid": 2 / 3, "name": 2 / 3, "exact": 2 / 3}
    assert json.loads(printed("--json", "--wrong"))["wrong"][0]["row"] == 3
    assert "row 3: not one JSON object" in printed("--wrong")
