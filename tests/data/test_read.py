"""Every kind of file and source, and what is said about bad ones."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratune.data.example import Place
from loratune.data.read import Corpus, read
from loratune.errors import ConfigError, DataError

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
PAIR = {"prompt": "2 + 2 =", "completion": "4"}
Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return to_file


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def problems_of(data: Any, **options: Any) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        read(data, **options)
    assert caught.value.hint
    return caught.value.problems


@pytest.fixture
def same_in_every_format(write: Write) -> dict[str, Corpus]:
    pa = pytest.importorskip("pyarrow")
    import datasets
    import pyarrow.parquet as pq

    rows = [PAIR, {"prompt": 'a "quoted", 北京\nsecond line', "completion": "b"}]
    csv_text = 'prompt,completion\r\n2 + 2 =,4\r\n"a ""quoted"", 北京\nsecond line",b\r\n'
    sources = {
        "rows": rows,
        "jsonl": write("a.jsonl", lines(*rows)),
        "ndjson": write("a.ndjson", lines(*rows)),
        "json": write("a.json", json.dumps(rows)),
        "wrapped": write("w.json", json.dumps({"version": [1, 2], "about": {"x": [{}]}, "data": rows, "end": None})),
        "lines in .json": write("l.json", lines(*rows)),
        "array in .jsonl": write("arr.jsonl", json.dumps(rows, indent=2)),
        "csv": write("a.csv", csv_text),
        "semicolons": write("s.csv", csv_text.replace(",", ";", 1).replace("=,4", "=;4").replace('",b', '";b')),
        "tsv": write("a.tsv", csv_text.replace(",", "\t", 1).replace("=,4", "=\t4").replace('",b', '"\tb')),
        "dataset": datasets.Dataset.from_list(rows),
    }
    pq.write_table(pa.Table.from_pylist(rows), write("a.parquet", b""))
    sources["parquet"] = str(write("a.jsonl", lines(*rows)).with_name("a.parquet"))
    return {name: read(data) for name, data in sources.items()}


def test_the_source_does_not_change_the_content(same_in_every_format: dict[str, Corpus]) -> None:
    hashes = {name: corpus.sha256 for name, corpus in same_in_every_format.items()}
    assert len(set(hashes.values())) == 1, hashes
    assert {corpus.shape for corpus in same_in_every_format.values()} == {"prompt/completion"}


def test_places_count_lines_or_rows(same_in_every_format: dict[str, Corpus]) -> None:
    places = {name: [str(e.place) for e in corpus.examples] for name, corpus in same_in_every_format.items()}
    assert places["jsonl"] == ["a.jsonl:1", "a.jsonl:2"]
    assert places["json"] == ["a.json:1", "a.json:2"]
    assert places["csv"] == ["a.csv:2", "a.csv:3"]
    assert places["parquet"] == ["a.parquet:1", "a.parquet:2"]
    assert places["rows"] == ["rows:1", "rows:2"]


def test_a_record_of_several_lines_moves_the_next_one(write: Write) -> None:
    corpus = read(write("a.csv", 'prompt,completion\n"a\n\nb",c\n\nd,e\n'))
    assert [(e.prompt, e.place.row) for e in corpus.examples] == [("a\n\nb", 2), ("d", 6)]


def test_long_csv_fields_are_read_and_leave_the_process_as_it_was(write: Write) -> None:
    before = csv.field_size_limit()
    assert len(read(write("a.csv", "text\n" + "x" * 200_000)).examples[0].text) == 200_000
    assert csv.field_size_limit() == before


def test_a_bad_line_does_not_spoil_the_next(write: Write) -> None:
    text = '{"text": {"a": 1, "a": 2}, }\n{"text": "fine"}\n'
    (problem,) = problems_of(write("a.jsonl", text))
    assert problem.startswith("a.jsonl:1: not valid JSON")


def test_parquet_rows_are_numbered_through(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": [f"t{i}" for i in range(2500)]}), tmp_path / "many.parquet", row_group_size=1000)
    corpus = read(tmp_path / "many.parquet")
    assert [e.place.row for e in corpus.examples] == list(range(1, 2501))
    assert corpus.examples[-1].text == "t2499"


def test_bom_crlf_empty_lines_and_no_last_newline(write: Write) -> None:
    text = "\ufeff" + json.dumps(PAIR) + "\r\n\r\n  \n" + json.dumps(PAIR)
    corpus = read(write("a.jsonl", text))
    assert [e.place.row for e in corpus.examples] == [1, 4]
    assert read(write("a.json", "\ufeff[" + json.dumps(PAIR) + "]\n")).examples[0].prompt == PAIR["prompt"]
    assert read(write("a.csv", "\ufeffprompt,completion\n\na,b\n")).examples[0].place.row == 3


def test_line_separators_inside_strings_do_not_end_a_line(write: Write) -> None:
    row = {"text": "one\u2028two\x85three\x0bfour"}
    corpus = read(write("a.jsonl", json.dumps(row, ensure_ascii=False) + "\n"))
    assert corpus.examples[0].text == row["text"]


def test_text_rows_are_paragraphs(write: Write) -> None:
    corpus = read(write("a.txt", "\r\nfirst line\r\nsecond line\r\n\r\n \t\r\nnext\n"))
    assert [(e.text, e.place.row) for e in corpus.examples] == [("first line\nsecond line", 2), ("next", 6)]
    assert corpus.shape == "text"


def test_every_bad_line_is_named_in_order(write: Write) -> None:
    text = lines(PAIR) + "\n".join(
        [
            "{not json",
            '{"prompt": "a", "prompt": "b", "completion": "c"}',
            '{"prompt": "a", "completion": NaN}',
            '{"prompt": "a", "completion": "b"} trailing',
            "[1]",
            '{"prompt": null, "completion": "b"}',
            '{"text": "x"}',
            '{"prompt": "a", "completion": ""}',
            '{"prompt": "\\ud800", "completion": "b"}',
            '{"prompt": "a", "completion": ' + "9" * 5000 + "}",
            '{"prompt": ' + "[" * 100_000,
        ]
    )
    found = problems_of(write("bad.jsonl", text))
    assert [problem.split(": ")[0] for problem in found] == [f"bad.jsonl:{n}" for n in range(2, 13)]
    expected = (
        "not valid JSON: Expecting property name",
        "duplicate key 'prompt'",
        "NaN is not JSON",
        "text after the end of the object, at column 36",
        "is a list, expected an object",
        "'prompt' is null",
        "has no 'prompt', 'completion', which the other rows have (prompt/completion); it has 'text'",
        "row without an answer",
        "unpaired surrogate",
        "not valid JSON",
        "nested too deeply",
    )
    for problem, words in zip(found, expected, strict=True):
        assert words in problem


def test_nested_duplicate_keys_are_named(write: Write) -> None:
    row = '{"messages": [{"role": "user", "role": "system", "content": "a"}]}'
    assert any("a.jsonl:1: duplicate key 'role'" in p for p in problems_of(write("a.jsonl", row)))
    assert any(
        "a.json:2: duplicate key 'b'" in p for p in problems_of(write("a.json", '[{"text": "a"}, {"b": 1, "b": 2}]'))
    )
    wrapped = '{"data": [{"text": "a"}, {"b": 1, "b": 2}]}'
    assert any("a.json:2: duplicate key 'b'" in p for p in problems_of(write("a.json", wrapped)))
    twice = '{"data": [{"text": "a"}], "version": 1, "data": [{"text": "b"}]}'
    assert any("'data' comes more than once" in p for p in problems_of(write("a.json", twice)))
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = json.dumps({"messages": json.dumps(said).replace('"role": "user"', '"role": "system", "role": "user"')})
    assert any("duplicate key 'role'" in p for p in problems_of(write("a.jsonl", row)))


def test_wrong_encodings_are_named(write: Write) -> None:
    latin = lines(PAIR).encode() + '{"text": "café"}\n'.encode("latin-1")
    assert problems_of(write("a.jsonl", latin)) == ("a.jsonl:2: not valid UTF-8 (byte 0xe9)",)
    assert problems_of(write("a.txt", "ok\n\ncafé".encode("latin-1"))) == ("a.txt:3: not valid UTF-8 (byte 0xe9)",)
    assert problems_of(write("a.csv", "text\nok\ncafé".encode("latin-1"))) == ("a.csv:3: not valid UTF-8 (byte 0xe9)",)
    for name in ("a.jsonl", "a.csv", "a.json"):
        assert "UTF-16" in problems_of(write(name, lines(PAIR).encode("utf-16")))[0]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "\n \n", "no rows"),
        ("a.json", "[]", "no rows"),
        ("a.json", "[1, 2", "a.json:1: not valid JSON: Expecting ',' or ']'"),
        ("a.json", '[{"text": "a"},\n]', "a.json:2: not valid JSON"),
        ("a.json", '[{"text": "a"}]\n]', "text after the end of the array"),
        ("a.json", "3", "is a number, expected an array"),
        ("a.json", "{", "a.json:1: not valid JSON"),
        ("a.json", '{"x": 1}', "an object with 'x': no list of rows"),
        ("a.json", '{"a": [{"text": "x"}], "b": [{"text": "x"}]}', "more than one list of rows"),
        ("a.csv", "text\n", "no rows"),
        ("a.csv", "text,text\na,b\n", "column 'text' appears twice"),
        ("a.csv", "prompt,completion\na\n", "a.csv:2: has 1 fields, the header has 2"),
        ("a.csv", 'prompt,completion\nx,y\n"a,b\n', "a.csv:3: not valid CSV"),
        ("a.txt", "\n\n", "no rows"),
        ("a.parquet", "no parquet", "not a readable Parquet file"),
        ("a.xlsx", "x", "unknown file type '.xlsx'"),
        ("noend", "x", "unknown file type ''"),
    ],
)
def test_unreadable_files(write: Write, name: str, content: str, words: str) -> None:
    assert words in problems_of(write(name, content))[0]


def test_one_object_in_a_json_file_is_one_row(write: Write) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert len(read(write("a.json", json.dumps(row))).examples) == 1


def test_missing_files_folders_and_wrong_types(tmp_path: Path, write: Write) -> None:
    write("train.jsonl", lines(PAIR))
    assert "no such file; did you mean 'train.jsonl'?" in problems_of(tmp_path / "trian.jsonl")[0]
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert "is a folder" in caught.value.problems[0]
    assert "train.jsonl" in caught.value.hint
    assert "no such file" in problems_of("x" * 5000)[0]
    assert "no such file" in problems_of("a\0b")[0]
    with pytest.raises(DataError, match="expected a path"):
        read(3)  # type: ignore[arg-type]
    assert "one mapping with 'train'" in problems_of({"train": []})[0]
    assert problems_of([PAIR, "text"]) == ("rows:2: is a string, expected a mapping",)


def test_a_file_that_cannot_be_opened_is_named(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("a.jsonl", lines(PAIR))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert problems_of(path) == (f"{path}: cannot be read: Permission denied",)


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[str, str]] = []
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    found = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)

    def load(name: str, split: str) -> Any:
        asked.append((name, split))
        return found

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert problems_of("owner/films") == ("owner/films:3: column 'label' is null, expected a string or a number",)
    found = found.select([0, 1])
    corpus = read("owner/films")
    assert [e.completion for e in corpus.examples] == ["good", "bad"]
    assert (corpus.source, asked[0]) == ("owner/films", ("owner/films", "train"))
    assert corpus.examples[1].place == Place("owner/films", 2)


def test_hub_failures_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("could not reach the hub\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert "data set that could be loaded from the hub: could not reach the hub" in problems_of("owner/nothing")[0]


def test_arrow_nulls_do_not_become_keys(tmp_path: Path) -> None:
    import datasets

    rows = [
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "Bo"}],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "string"}}}}],
        },
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "tools": [{"type": "function", "function": {"name": "g", "parameters": {"y": {"type": "string"}}}}],
        },
    ]
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "a.parquet")
    assert read(data.with_format("numpy")).sha256 == read(rows).sha256
    assert read(data).sha256 == read(rows).sha256 == read(tmp_path / "a.parquet").sha256
    assert dict(read(data).examples[1].messages[1]) == {"role": "assistant", "content": "b"}


def test_columns_are_mapped_and_surplus_ones_shown() -> None:
    rows = [{"question": "a", "answer": "b", "text": "other", "id": 1}]
    corpus = read(rows, columns={"prompt": "question", "completion": "answer"})
    assert (corpus.examples[0].prompt, corpus.examples[0].completion) == ("a", "b")
    assert corpus.ignored_columns == ("id", "text")
    body = read([{"text": "old", "body": "new"}], columns={"text": "body"})
    assert body.examples[0].text == "new"
    assert read([{"body": "new", "text": "old"}], columns={"text": "body"}).examples[0].text == "new"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert read([{"messages": chat, "body": "new"}], columns={"text": "body"}).shape == "text"
    swapped = read([PAIR], columns={"prompt": "completion", "completion": "prompt"})
    assert swapped.examples[0].completion == PAIR["prompt"]


def test_wrong_columns_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        read([PAIR], columns={"promt": "prompt", "text": "promt", "completion": "promt"})
    said = "\n".join(caught.value.problems)
    assert "'promt' is not a column of any shape; did you mean 'prompt'?" in said
    assert "no row has a column 'promt'; did you mean 'prompt'?" in said
    assert "'promt' is mapped twice" in said


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"question": "a", "answer": "b"}, "prompt=question,completion=answer"),
        ({"promt": "a", "completion": "b"}, "prompt=promt"),
        ({"input": "a", "output": "b"}, "prompt=input,completion=output"),
        ({"Content": "a"}, "text=Content"),
        ({"foo": "a"}, "prompt=…,completion=…"),
    ],
)
def test_unknown_shapes_suggest_a_mapping(row: dict[str, str], mapping: str) -> None:
    with pytest.raises(DataError) as caught:
        read([row])
    assert all(repr(name) in caught.value.problems[0] for name in row)
    assert "instruction + output" in caught.value.problems[0]
    assert caught.value.hint == f"name them: --columns {mapping}"
    if "…" not in mapping:
        read([row], columns=dict(item.split("=") for item in mapping.split(",")))


def test_a_corpus_passes_through() -> None:
    corpus = read([PAIR])
    assert read(corpus) is corpus
    assert len(corpus) == 1


def test_the_hash_sees_content_and_order_and_is_stable_across_processes() -> None:
    other = {"prompt": "a", "completion": "b"}
    hashes = {read(rows).sha256 for rows in ([PAIR], [other], [PAIR, other], [other, PAIR])}
    assert len(hashes) == 4
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert read([chat]).sha256 != read([chat | {"tools": [{"name": "f"}]}]).sha256
    assert read([{"instruction": "a", "output": "b"}]).sha256 != read([other]).sha256
    assert read([PAIR | {"id": 7}]).sha256 == read([PAIR]).sha256
    code = f"from loratune.data.read import read; print(read([{PAIR!r}]).sha256)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert run.stdout.strip() == read([PAIR]).sha256


def test_importing_the_room_loads_nothing_heavy() -> None:
    code = (
        "import sys, loratune.data.read, loratune.data.render, loratune.data.split, loratune.data.fit\n"
        "print([name for name in ('torch', 'datasets', 'transformers', 'pyarrow') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert run.stdout.strip() == "[]"


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1))
def test_any_text_survives_json(texts: list[str]) -> None:
    corpus = read([json.loads(json.dumps({"text": text})) for text in texts])
    assert [e.text for e in corpus.examples] == texts


@given(st.binary(max_size=200), st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet"]))
def test_no_bytes_meet_a_traceback(tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    with contextlib.suppress(DataError):
        assert read(path).examples


def test_a_data_set_with_a_time_that_python_does_not_have() -> None:
    import datasets
    import pyarrow as pa

    when = pa.array([0, 2**62], pa.timestamp("us"))
    found = datasets.Dataset(pa.table({"prompt": ["a", "b"], "completion": ["c", "d"], "when": when}))
    with pytest.raises(DataError, match=r"rows:2: cannot be read: date value out of range"):
        read(found)
