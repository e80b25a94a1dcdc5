"""Reading a run folder: what is tolerated, and what is an error that says where."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratune.errors import RunFolderError
from loratune.report import REPORT, write_report
from loratune.report.folder import read_run
from tests.report.conftest import STEPS, Write, made_up_metrics, made_up_record


def test_values_are_typed(write_run: Write) -> None:
    run = read_run(write_run())
    assert run.record.settings["r"].value == 16
    assert run.record.settings["epochs"].is_given
    assert run.record.adapter.modules[0].in_features == 576
    assert run.record.plan.estimate.seconds == 180.0
    assert run.metrics is not None
    assert sum(metric.loss is not None for metric in run.metrics) == STEPS
    assert run.damage == ()


def test_folder_without_record(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"has no record\.json") as caught:
        write_report(tmp_path)
    assert "loratune train" in caught.value.hint
    assert not (tmp_path / REPORT).exists()


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is not a folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"format": 1', b"\xff\xfe", b"[" * 100_000, b'{"format": ' + b"9" * 5000 + b"}"]
)
def test_broken_record(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(RunFolderError, match=r"record\.json is not JSON") as caught:
        write_report(tmp_path)
    assert caught.value.hint


def test_record_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text("[1]")
    with pytest.raises(RunFolderError, match="holds a list, not an object"):
        write_report(tmp_path)


@pytest.mark.parametrize("version", [None, 2, "1"])
def test_record_of_another_format(write_run: Write, version: object) -> None:
    with pytest.raises(RunFolderError, match=f"has format {version!r}; this loratune reads format 1"):
        read_run(write_run(made_up_record() | {"format": version}))


def test_all_wrong_values_at_once(write_run: Write) -> None:
    record = made_up_record()
    record["data"]["rows"] = "many"
    record["plan"]["packed"] = 1
    record["measured"]["seconds"] = True
    record["checks"] = {"a": 1}
    record["adapter"]["modules"][2]["in"] = 0.5
    record["base"] = []
    record["settings"]["r"] = 16
    record["hardware"]["memory_bytes"] = 10**400
    with pytest.raises(RunFolderError) as caught:
        read_run(write_run(record, metrics=[{"step": 1}, {"step": "two"}, 3]))
    text = "\n".join(caught.value.problems)
    for problem in (
        "record.json.data.rows is 'many', not a whole number",
        "record.json.plan.packed is 1, not true or false",
        "record.json.measured.seconds is True, not a number",
        "record.json.checks is {'a': 1}, not a list",
        "record.json.adapter.modules[2].in is 0.5, not a whole number",
        "record.json.base is [], not an object",
        "record.json.settings.r is 16, not an object",
        "record.json.hardware.memory_bytes is 1",
        "metrics.jsonl:2.step is 'two', not a whole number",
        "metrics.jsonl:3 is 3, not an object",
    ):
        assert problem in text
    assert len(caught.value.problems) == 10


def test_unknown_keys_are_left_alone(write_run: Write) -> None:
    record = made_up_record() | {"later": {"a": 1}}
    record["plan"]["later"] = 2
    assert read_run(write_run(record)).record.plan.steps == STEPS


@pytest.mark.parametrize("half", ['{"step": 8', '{"step": 8, "text": "é', "{", '{"step": 8, "loss": 1.'])
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_half_written_last_line(write_run: Write, name: str, half: str) -> None:
    folder = write_run(metrics=made_up_metrics()[:5])
    with (folder / name).open("ab") as file:
        file.write(half.encode()[: -1 if half.endswith("é") else None])
    run = read_run(folder)
    assert run.damage == (f"The last line of {name} is half-written and was left out.",)
    assert run.metrics is not None
    assert len(run.metrics) == 5


def test_last_line_without_its_end_is_read(write_run: Write) -> None:
    folder = write_run()
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.rstrip("\n"))
    run = read_run(folder)
    assert run.metrics is not None
    assert len(run.metrics) == len(made_up_metrics())
    assert run.damage == ()


def test_broken_line_in_the_middle(write_run: Write) -> None:
    folder = write_run()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:3], '{"step": 3, "lo', *lines[3:], ""]))
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:4 is not JSON"):
        read_run(folder)


def test_empty_files_are_there_and_empty(write_run: Write) -> None:
    run = read_run(write_run(metrics=[], samples=[]))
    assert run.metrics == ()
    assert run.samples == ()
