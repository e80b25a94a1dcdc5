"""Files that are wrong as a whole: encodings, ends, containers, names, and what is no file."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.malformed.cases import REFUSED, Case, Make, written

ROW = {"prompt": "1 + 1 =", "completion": "2"}
LINE = json.dumps(ROW)
FIVE = "".join(f"{LINE}\n" for _ in range(5))
CSV = "prompt,completion\n" + "1 + 1 =,2\n" * 5
UMLAUTS = json.dumps({"prompt": "Grüße?", "completion": "schön"}, ensure_ascii=False) + "\n"


def refused(name: str, make: Make, *named: str) -> Case:
    return Case(name, make, named, REFUSED)


def accepted(name: str, make: Make, rows: int = 5) -> Case:
    return Case(name, make, (), rows)


def cases() -> Iterator[Case]:
    yield from _encodings()
    yield from _jsonl()
    yield from _csv()
    yield from _json()
    yield from _parquet()
    yield from _text()
    yield from _names()
    yield from _no_files()


def _encodings() -> Iterator[Case]:
    yield accepted("utf-8 with a mark", written("rows.jsonl", b"\xef\xbb\xbf" + FIVE.encode()))
    yield accepted("csv with a mark", written("rows.csv", b"\xef\xbb\xbf" + CSV.encode()))
    yield accepted("umlauts", written("rows.jsonl", UMLAUTS * 5))
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "cp037"):
        for name, text in (
            ("rows.jsonl", UMLAUTS * 5),
            ("rows.json", f"[{UMLAUTS}]"),
            ("rows.csv", "text\nschön\n" * 3),
        ):
            yield refused(f"{name} in {encoding}", written(name, text.encode(encoding)))
    for bad in (b"\xff", b"\xc3", b"\xed\xa0\xbd", b"\xf8\x88\x80\x80\x80", b"\xc0\x80"):
        line = LINE.encode().replace(b"2", bad)
        content = (LINE.encode() + b"\n") * 2 + line + b"\n"
        yield refused(f"bytes {bad.hex()} in a row", written("rows.jsonl", content), "rows.jsonl:3", "UTF-8")
    yield refused("a mark within", written("rows.jsonl", f"{LINE}\n\ufeff{LINE}\n"), "rows.jsonl:2")
    yield refused("packed by gzip", written("rows.jsonl", gzip.compress(FIVE.encode())))
    yield refused("zero bytes", written("rows.jsonl", b"\x00" * 4096))
    yield refused("noise", written("rows.jsonl", bytes(range(256)) * 16))


def _jsonl() -> Iterator[Case]:
    yield refused("empty", written("rows.jsonl", ""), "empty")
    yield refused("only a mark", written("rows.jsonl", b"\xef\xbb\xbf"))
    yield refused("blank", written("rows.jsonl", " \n\t\n\n"))
    yield accepted("Windows' line ends", written("rows.jsonl", FIVE.replace("\n", "\r\n")))
    yield accepted("no end of the last line", written("rows.jsonl", FIVE.rstrip("\n")))
    yield accepted("blank lines between", written("rows.jsonl", FIVE.replace("\n", "\n\n  \n")))
    yield refused("old Macintosh line ends", written("rows.jsonl", FIVE.replace("\n", "\r")))
    yield refused("the last line cut off", written("rows.jsonl", FIVE[:-9]), "rows.jsonl:5")
    yield accepted("one array", written("rows.jsonl", json.dumps([ROW] * 5)))
    yield refused("rows over several lines", written("rows.jsonl", json.dumps(ROW, indent=1)), "rows.jsonl:1")
    mixed = [ROW, {"text": "one"}, ROW, {"messages": []}]
    yield refused(
        "mixed shapes", written("rows.jsonl", "".join(json.dumps(row) + "\n" for row in mixed)), "rows.jsonl:2"
    )
    yield refused("no shape at all", written("rows.jsonl", '{"a": 1}\n{"b": 2}\n'))
    yield refused("a thousand bad rows", written("rows.jsonl", "{\n" * 1000), "rows.jsonl:1")


def _csv() -> Iterator[Case]:
    yield accepted("csv", written("rows.csv", CSV))
    yield accepted("csv with a new line in quotes", written("rows.csv", CSV + '"a\nb","c"\n'), 6)
    yield accepted("csv with Windows' line ends", written("rows.csv", CSV.replace("\n", "\r\n")))
    yield accepted(
        "csv with a field of 1 MB", written("rows.csv", "text\n" + "a" * 200 + "\n" + '"' + "b," * 60 + '"\n'), 2
    )
    yield refused("csv: header only", written("rows.csv", "prompt,completion\n"))
    yield refused("csv: empty", written("rows.csv", ""))
    yield refused("csv: no header", written("rows.csv", "1 + 1 =,2\n" * 5))
    yield refused("csv: the same column twice", written("rows.csv", "prompt,prompt\na,b\n"), "prompt")
    yield refused("csv: a short row", written("rows.csv", CSV + "1 + 1 =\n"), "rows.csv:7")
    yield refused("csv: a long row", written("rows.csv", CSV + "1 + 1 =,2,3\n"), "rows.csv:7")
    yield refused("csv: a quote without an end", written("rows.csv", CSV + '"1 + 1 =,2\n'), "rows.csv")
    yield accepted("csv: semicolons", written("rows.csv", CSV.replace(",", ";")))
    yield accepted("csv: tabs", written("rows.csv", CSV.replace(",", "\t")))
    yield refused("csv: a zero byte", written("rows.csv", CSV + "a\x00,\n"))
    yield refused("csv: an empty answer", written("rows.csv", CSV + "1 + 1 =,\n"), "rows.csv:7")
    yield refused("csv: a column without a name", written("rows.csv", CSV.replace("completion", "")))
    yield accepted("tsv", written("rows.tsv", CSV.replace(",", "\t")))
    yield accepted("tsv: commas", written("rows.tsv", CSV))


def _json() -> Iterator[Case]:
    rows = [ROW] * 5
    yield accepted("json", written("rows.json", json.dumps(rows, indent=2)))
    yield accepted("json: rows under a name", written("rows.json", json.dumps({"version": 1, "data": rows})))
    for text in ("", " ", "null", "3", '"a"', "true", "[]", "{}", "[1, 2]", "[null]", '["a"]', "[[]]", "[{}]"):
        yield refused(f"json: only {text!r}", written("rows.json", text))
    yield refused("json: two lists", written("rows.json", json.dumps({"train": rows, "test": rows})), "train", "test")
    yield refused("json: columns", written("rows.json", json.dumps({"prompt": ["a"], "completion": ["b"]})))
    yield refused("json: cut off", written("rows.json", json.dumps(rows)[:-9]))
    yield refused("json: a comma too many", written("rows.json", json.dumps(rows)[:-1] + ",]"))
    yield refused("json: two documents", written("rows.json", json.dumps(rows) * 2))
    yield accepted("json: one object a line", written("rows.json", FIVE))
    yield refused("json: NaN", written("rows.json", json.dumps([{**ROW, "score": float("nan")}])), "NaN")
    yield refused("json: the same key twice", written("rows.json", f'[{LINE[:-1]}, "prompt": "a"}}]'), "prompt")
    yield refused("json: very deep", written("rows.json", "[" * 200_000 + "]" * 200_000))
    yield refused("json: a row of another shape", written("rows.json", json.dumps([*rows, {"text": "a"}])), "6")


def _parquet() -> Iterator[Case]:
    def table(**columns: Any) -> bytes:
        sink = io.BytesIO()
        pq.write_table(pa.table(columns), sink)
        return sink.getvalue()

    good = table(prompt=["1 + 1 ="] * 5, completion=["2"] * 5)
    yield accepted("parquet", written("rows.parquet", good))
    yield refused("parquet: no rows", written("rows.parquet", table(prompt=[], completion=[])))
    yield refused(
        "parquet: null", written("rows.parquet", table(prompt=["a", "b"], completion=["c", None])), "rows.parquet:2"
    )
    yield refused("parquet: numbers", written("rows.parquet", table(prompt=["a"], completion=[2])), "rows.parquet:1")
    yield refused(
        "parquet: bytes", written("rows.parquet", table(prompt=["a"], completion=[b"\xff"])), "rows.parquet:1"
    )
    yield refused(
        "parquet: structs", written("rows.parquet", table(prompt=["a"], completion=[{"x": 1}])), "rows.parquet:1"
    )
    yield refused("parquet: other columns", written("rows.parquet", table(a=["a"], b=["b"])))
    odd = {
        "a time beyond Python's": (pa.array([0, 2**40], pa.timestamp("s")), "timestamp[ms]"),
        "a time before Python's": (pa.array([0, -(2**40)], pa.timestamp("s")), "timestamp[ms]"),
        "a day beyond Python's": (pa.array([0, 2**30], pa.date32()), "date32[day]"),
        "a time beyond Python's in a list": (pa.array([[0], [2**62]], pa.list_(pa.timestamp("us"))), "timestamp[us]"),
        "a span beyond Python's": (pa.array([0, 2**62], pa.duration("s")), "duration[s]"),
    }
    for name, (column, kind) in odd.items():
        yield refused(
            f"parquet: {name}",
            written("rows.parquet", table(prompt=["a", "b"], completion=["c", "d"], when=column)),
            "rows.parquet:2",
            f"'when' of type {kind}" if "list" not in name else "'when' of type list<",
        )
    yield accepted(
        "parquet: times",
        written("rows.parquet", table(prompt=["a"], completion=["b"], when=pa.array([1], pa.timestamp("ns")))),
        1,
    )
    # Arrow keeps text as bytes and does not look at them.
    ends = pa.py_buffer(b"".join(end.to_bytes(4, "little") for end in (0, 1, 2)))
    text = pa.Array.from_buffers(pa.string(), 2, [None, ends, pa.py_buffer(b"a\xff")])
    yield refused(
        "parquet: text that is no UTF-8",
        written("rows.parquet", table(prompt=text, completion=["c", "d"])),
        "rows.parquet:2",
        "'prompt'",
    )
    for name, content in {
        "empty": b"",
        "noise": bytes(range(256)) * 4,
        "cut off": good[: len(good) // 2],
        "without its end": good[:-8],
        "its end only": good[-8:],
        "zeros within": good[:40] + b"\x00" * (len(good) - 80) + good[-40:],
        "text": FIVE.encode(),
    }.items():
        yield refused(f"parquet: {name}", written("rows.parquet", content))


def _text() -> Iterator[Case]:
    yield accepted("text", written("rows.txt", "One.\n\nTwo,\nand more.\n\n\nThree.\n"), 3)
    yield accepted("text: Windows' line ends", written("rows.txt", "One.\r\n\r\nTwo.\r\n"), 2)
    yield refused("text: empty", written("rows.txt", ""))
    yield refused("text: blank", written("rows.txt", "\n \n\t\n"))
    yield refused("text: no UTF-8", written("rows.txt", b"One.\n\nTw\xff.\n"))
    yield refused("text: 10 MB", written("rows.txt", "word " * 2_000_000), "tokens")
    yield refused("text: half a surrogate pair", written("rows.txt", b"a\xed\xa0\xbdb\n"))


def _names() -> Iterator[Case]:
    for name in ("rows", "rows.xyz", "rows.jsonl.bak", "rows.zip", "rows.pkl", ".jsonl", "rows.jsonl.gz"):
        yield refused(f"a file called {name}", written(name, FIVE))
    for name in ("ROWS.JSONL", "r o w s.jsonl", "röws🙂.jsonl", "שורות.jsonl", "a\nb.jsonl", "[bold]x[-bold].jsonl",
                 "rows.ndjson", "'quoted\".jsonl", "-rows.jsonl", "a" * 240 + ".jsonl", "%s{0}$X.jsonl"):  # fmt: skip
        yield accepted(f"a file called {name[:20]!r}", written(name, FIVE))


def _no_files() -> Iterator[Case]:
    def made(act: Callable[[Path], object], name: str = "rows.jsonl") -> Make:
        def make(folder: Path) -> Path:
            act(folder / name)
            return folder / name

        return make

    def link(to: str) -> Make:
        def act(path: Path) -> None:
            (path.parent / "real.jsonl").write_text(FIVE)
            path.symlink_to(to)

        return made(act)

    yield accepted("a link to a file", link("real.jsonl"))
    yield refused("a link to nothing", link("gone.jsonl"))
    yield refused("a link to itself", link("rows.jsonl"))
    yield refused("a folder", made(lambda path: path.mkdir()))
    yield refused("nothing", made(lambda _: None), "no such file")
    yield refused("a pipe", made(os.mkfifo))
    yield refused("nothing, above", made(lambda _: None, "../../nowhere/rows.jsonl"))
    yield refused("a name beyond what there can be", made(lambda _: None, "x" * 300 + ".jsonl"))
    yield refused("a name with a zero byte", made(lambda _: None, "ro\x00ws.jsonl"))
    yield Case("the null device", lambda _: Path("/dev/null"), (), REFUSED)
