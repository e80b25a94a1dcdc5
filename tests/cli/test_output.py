"""Standard output that is full or has few characters, and names of files that are not UTF-8."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from loratune.cli import main
from tests.cli.conftest import QUICK

pytestmark = pytest.mark.usefixtures("fast")
BAD = os.fsdecode(b"sch\xf6n")


@dataclass(frozen=True)
class Printed:
    code: int
    out: bytes
    err: str


Printing = Callable[..., Printed]


@pytest.fixture
def printing(monkeypatch: pytest.MonkeyPatch) -> Printing:
    """Run `loratune …` here, with a standard output of this encoding, which refuses what that lacks."""

    def run(*words: object, encoding: str = "utf-8") -> Printed:
        raw, err = io.BytesIO(), io.StringIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="strict"))
        monkeypatch.setattr(sys, "stderr", err)
        code = main([str(word) for word in words])
        sys.stdout.flush()
        return Printed(code, raw.getvalue(), err.getvalue())

    return run


@pytest.mark.parametrize("words", [("show",), ("show", "--json"), ("report",), ("--help",), ("--version",)])
def test_a_full_standard_output(
    words: tuple[str, ...], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = [str(shutil.copytree(finished, tmp_path / "run"))] if words[0] in ("show", "report") else []
    err = io.StringIO()
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", err)
        assert main([words[0], *run, *words[1:]]) == 1
        full.flush()  # as Python does in the end
        monkeypatch.undo()
    assert err.getvalue() == (
        "error standard output: No space left on device\nhint: free some space, or send it elsewhere\n"
    )


def test_an_error_is_said_though_standard_output_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.StringIO()
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", err)
        assert main(["data", str(tmp_path / "none.jsonl"), "--model", str(tmp_path), "--json"]) in (1, 3)
        full.flush()
        monkeypatch.undo()
    assert err.getvalue().startswith("error ")
    assert str(tmp_path) in err.getvalue()
    assert "standard output" not in err.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_characters_that_cannot_be_printed(encoding: str, base: str, data: str, printing: Printing) -> None:
    plan = printing("plan", base, data, *QUICK, encoding=encoding)
    assert plan.code == 0, plan.err
    said = plan.out.decode(encoding)
    assert "α=8".encode(encoding, "replace").decode(encoding) in said
    assert "2 held out" in said
    as_json = printing("plan", base, data, *QUICK, "--json", encoding=encoding)
    assert "α=8" in json.loads(as_json.out.decode(encoding))["line"]


def test_answers_are_json_in_any_encoding(finished: Path, tmp_path: Path, printing: Printing) -> None:
    (tmp_path / "prompts.txt").write_text("1 + 1 = 🙂\n")
    words = ("generate", finished, "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 2)
    said = printing(*words, encoding="ascii")
    assert said.code == 0, said.err
    assert "🙂" in json.dumps(json.loads(said.out), ensure_ascii=False)


@pytest.fixture
def bad(tmp_path: Path, data: str) -> Path:
    """A folder of this name, with rows of this name in it."""
    folder = tmp_path / BAD
    folder.mkdir()
    shutil.copy(data, folder / f"{BAD}.jsonl")
    return folder


def test_names_that_are_not_utf8(bad: Path, base: str, printing: Printing) -> None:
    """Rows and run: trained, looked at, done again; the name that is printed is the one that opens the folder."""
    run, rows = bad / f"run {BAD}", bad / f"{BAD}.jsonl"
    trained = printing("train", base, rows, "--out", run, *QUICK)
    assert trained.code == 0, trained.err
    assert trained.out == os.fsencode(run) + b"\n"
    assert "internal error" not in trained.err
    record = json.loads((run / "record.json").read_text(encoding="utf-8"))
    assert record["data"]["source"] == str(rows)
    shown = printing("show", run, "--json")
    assert json.loads(shown.out.decode("utf-8"))["path"] == str(run)
    again = printing("reproduce", run)
    assert again.code == 0, again.err
    assert "the same bits" in again.out.decode()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("eval RUN --data BAD/ROWS", 0),
        ("data BAD/ROWS --model BAD/none", 1),
        ("report BAD", 1),
        ("show BAD", 1),
        ("merge RUN --out BAD/merged", 1),
        ("export RUN --to peft --out BAD/exported", 0),
        ("combine RUN RUN --out BAD/combined", 0),
        ("generate RUN --prompts BAD/ROWS --out BAD/out.jsonl --max-new-tokens 2", 0),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_other_commands_and_names_that_are_not_utf8(
    words: str, code: int, as_json: bool, bad: Path, finished: Path, printing: Printing
) -> None:
    """Done, or refused by name where a library takes no such name."""
    names = {"BAD": str(bad), "RUN": str(finished), "ROWS": f"{BAD}.jsonl"}
    given = ["/".join(names.get(part, part) for part in word.split("/")) for word in words.split()]
    said = printing(*given, *(["--json"] if as_json else []))
    assert said.code == code, said.err
    assert "internal error" not in said.err + said.out.decode(errors="replace")
    if as_json:
        assert json.loads(said.out.decode("utf-8"))
    elif code:
        assert repr(BAD)[1:-1] in said.err or BAD in said.err
