"""The page says everything a run folder holds, needs nothing else, and trusts none of it."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from loratune.report import REPORT, write_report
from tests.report.conftest import SAMPLES, Write, made_up_metrics, made_up_record

VOID = {"meta", "br", "hr", "img", "input", "link"}
SECTIONS = ("checks", "curves", "samples", "adapter", "cost", "data", "settings", "decisions", "origin", "use")


class Page(HTMLParser):
    """Elements with their attributes, visible text, and whether every element is closed where it must be."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.problems: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.problems.append(f"{tag} at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.words.append(data)

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.elements if attribute in attrs]


def page_at(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_report_is_a_file_of_the_folder(write_run: Write) -> None:
    folder = write_run()
    assert write_report(folder) == folder / REPORT
    assert sorted(path.name for path in folder.iterdir()) == [
        "metrics.jsonl",
        "record.json",
        "report.html",
        "samples.jsonl",
    ]


def test_every_part_is_there(write_run: Write) -> None:
    page = page_at(write_run())
    assert page.problems == []
    for name in SECTIONS:
        assert name in page.values("id")
    for text in (
        "Held-out loss fell from 2.04 to 1.31 (perplexity 7.7 → 3.7) in 150 steps, 3 min 12 s; all 9 checks passed.",
        "HuggingFaceTB/SmolLM2-135M-Instruct · 14 March 2026, 09:26 UTC",
        "off ≡ base",
        "Of 2 references, the tuned model gave 1 word for word, its base 0.",
        SAMPLES[0]["base"],
        "4,884,480 trainable parameters of 139,399,488 (3.50%).",
        "Median 9.9, from 5.0 to 15.0 of 16.",
        "1.83 GB",
        "4% below the estimate",
        "213,400 (61.0%)",
        "support.jsonl:88, support.jsonl:419, support.jsonl:733",
        "support.jsonl:14 = support.jsonl:901",
        "3 of 16 were given",
        "ten times full fine-tuning's, scaled by the width 576",
        "out of memory: micro-batch halved",
        "12fd25f77366fa6b3b4b768ec3050bf629380bac",
        "loratune chat runs/brave-otter --vs base",
        "lora = lt.attach(model, 'runs/brave-otter')",
    ):
        assert " ".join(text.split()) in page.text
    assert "Not complete" not in page.text
    assert "not recorded" not in page.text


def test_headings_descend_one_by_one(write_run: Write) -> None:
    levels = [int(tag[1]) for tag, _ in page_at(write_run()).elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_figures_speak(write_run: Write) -> None:
    figures = [attrs for tag, attrs in page_at(write_run()).elements if tag == "svg" and attrs.get("role") == "img"]
    labels = [attrs["aria-label"] or "" for attrs in figures]
    assert len(labels) == 6  # loss, once wide and once narrow; four small ones
    assert labels[0].startswith("Loss over steps. Held-out loss fell from 2.04")
    assert "Learning rate over steps: 1.62e-4 at first" in labels[2]


def test_page_asks_for_nothing(write_run: Write) -> None:
    page = page_at(write_run())
    html = (write_run() / REPORT).read_text(encoding="utf-8")
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "image", "form"}
    assert page.values("src") == []
    assert all(target.startswith("#") for target in page.values("href") + page.values("xlink:href"))
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)", html))
    assert "@import" not in html
    assert "://" not in html
    assert "default-src 'none'" in html


def test_every_id_is_one_and_every_reference_has_one(write_run: Write) -> None:
    page = page_at(write_run())
    html = (write_run() / REPORT).read_text(encoding="utf-8")
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    wanted = [target[1:] for target in page.values("href") + page.values("xlink:href")] + re.findall(
        r"url\(#([^)]+)\)", html
    )
    assert set(wanted + page.values("aria-labelledby")) <= set(ids)


ATTACKS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><script>alert(1)</script>",
    "{{ 7 * 191 }}{% raw %}",
    "' onmouseover='alert(1)",
    "javascript:alert(1)",
    "]]><!-- \u202e \ud800 \x00",
)


def _poisoned(value: Any, attack: str) -> Any:
    """Every text of a record replaced; names of settings and versions too."""
    if isinstance(value, dict):
        keys = {"state", "when", "created"}
        return {key: item if key in keys else _poisoned(item, attack) for key, item in value.items()}
    if isinstance(value, list):
        return [_poisoned(item, attack) for item in value]
    return attack if isinstance(value, str) else value


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_text_stays_text(write_run: Write, attack: str) -> None:
    clean = page_at(write_run())
    record = _poisoned(made_up_record(), attack)
    record["state"] = "finished"
    record["settings"][attack] = {"value": {attack: [attack]}, "reason": attack}
    record["versions"][attack] = attack
    for number, item in enumerate(record["adapter"]["effective_rank"]):
        item["path"] = f"{attack}.{number}.{attack}"
    samples = _poisoned(SAMPLES, attack)
    page = page_at(write_run(record, samples=samples, name="hostile"))
    assert page.problems == []
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in clean.elements}
    attributes = {name for _, attrs in page.elements for name in attrs}
    assert attributes <= {name for _, attrs in clean.elements for name in attrs}
    assert all(target.startswith("#") for target in page.values("href"))
    assert "1337" not in page.text


def test_commands_quote_the_shell(write_run: Write) -> None:
    record = made_up_record()
    record["settings"]["out"] = {"value": "runs/my run; rm -rf ~", "reason": "given"}
    assert "loratune show 'runs/my run; rm -rf ~'" in page_at(write_run(record)).text


def test_same_folder_same_bytes(write_run: Write, tmp_path: Path) -> None:
    folder = write_run()
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    settings = tmp_path / "matplotlibrc"
    settings.write_text("lines.linewidth: 9\nfont.size: 30\nsvg.fonttype: path\naxes.grid: True\n")
    for seed in ("1", "2"):
        code = "import sys, pathlib; from loratune.report import write_report; write_report(pathlib.Path(sys.argv[1]))"
        environment = {**os.environ, "PYTHONHASHSEED": seed, "MATPLOTLIBRC": str(settings), "TZ": "Asia/Tokyo"}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=environment)
        assert (folder / REPORT).read_bytes() == first


def test_drawing_leaves_matplotlib_as_it_was(write_run: Write) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    write_report(write_run())
    assert dict(mpl.rcParams) == before
    code = "import sys, loratune.report; print(*{'matplotlib', 'torch'} & sys.modules.keys())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == ""


def test_record_alone_is_enough(write_run: Write) -> None:
    page = page_at(write_run({"format": 1}, metrics=None, samples=None, name="bare"))
    assert page.problems == []
    for text in (
        "bare",
        "The record does not say whether this run ended; 0 steps done. So far: nothing was measured; no checks",
        "There is no metrics.jsonl: no curves.",
        "There is no samples.jsonl: no answers to compare.",
        "record.json has no checks.",
        "base model not recorded",
        "No losses were recorded.",
        "The adapted modules were not recorded.",
        "Effective ranks were not recorded",
        "Neither an estimate nor a measurement was recorded.",
        "Nothing about the data was recorded.",
        "No settings were recorded.",
        "Seeds and fingerprints were not recorded.",
        "Hardware and versions were not recorded.",
    ):
        assert text in page.text


@pytest.mark.parametrize("part", sorted(made_up_record().keys() - {"format"}))
def test_any_part_may_be_missing(write_run: Write, part: str) -> None:
    record = made_up_record()
    del record[part]
    assert page_at(write_run(record)).problems == []


@pytest.mark.parametrize(("part", "key"), [(p, k) for p, v in made_up_record().items() if type(v) is dict for k in v])
def test_any_value_may_be_missing(write_run: Write, part: str, key: str) -> None:
    record = made_up_record()
    record[part][key] = None
    html = write_report(write_run(record, metrics=None)).read_text(encoding="utf-8")
    assert ">None<" not in html


def test_interrupted_run_shows_how_far_it_came(write_run: Write) -> None:
    record = made_up_record() | {"state": "interrupted", "result": None, "measured": None}
    folder = write_run(record, metrics=[line for line in made_up_metrics() if line["step"] <= 87], samples=None)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 88, "lo')
    page = page_at(folder)
    assert "Interrupted after 87 of 150 steps. So far: held-out loss fell from 2.04 to 1.37" in page.text
    assert "The last line of metrics.jsonl is half-written and was left out." in page.text
    assert "give loratune train the same folder again" in page.text


def test_failed_check_is_named_and_marked(write_run: Write) -> None:
    record = made_up_record()
    record["checks"][6]["passed"] = False
    page = page_at(write_run(record))
    assert "1 of 9 checks failed: merged ≡ adapter." in page.text
    assert page.values("aria-label").count("failed") == 1
    assert "headline bad" in page.values("class")


def test_lost_steps_are_said_and_not_drawn(write_run: Write) -> None:
    metrics = made_up_metrics()
    metrics[40]["loss"], metrics[41]["grad_norm"] = float("nan"), float("inf")
    metrics.insert(60, metrics[59])
    page = page_at(write_run(metrics=metrics))
    steps = f"{metrics[40]['step']}, {metrics[41]['step']}"
    assert f"Not a finite number, and not drawn: steps {steps}." in page.text
    assert "1 step was done again after an interruption" in page.text
    assert "nan" not in (write_run(metrics=metrics) / REPORT).read_text().lower()


def test_long_runs_stay_small(write_run: Write) -> None:
    metrics = [
        {"step": step, "loss": 1 + (step % 97) / 97, "lr": 1e-4, "grad_norm": 1.0, "tokens": 900, "step_seconds": 0.1}
        for step in range(1, 20_001)
    ]
    assert write_report(write_run(metrics=metrics)).stat().st_size < 400_000


def test_one_step_is_a_curve_too(write_run: Write) -> None:
    assert page_at(write_run(metrics=made_up_metrics()[:2])).problems == []


def test_wider_models_drop_the_numbers_of_cells(write_run: Write) -> None:
    record = made_up_record()
    record["adapter"]["effective_rank"] = [
        *({"path": f"encoder.{n}.q", "effective": 4.0, "r": 8} for n in range(80)),
        *({"path": f"decoder.{n}.q", "effective": 2.0, "r": 8} for n in range(80)),
        {"path": "lm_head", "effective": 7.5, "r": 8},
    ]
    page = page_at(write_run(record))
    assert "heat dense" in page.values("class")
    assert "encoder.*.q" in page.text
    assert "lm_head 7.5" in page.text
    assert "decoder.79.q: 2.00 of 8" in page.values("title")


def test_conversations_are_prompts_too(write_run: Write) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    page = page_at(write_run(samples=[{"place": 3, "prompt": prompt, "base": "", "tuned": "So."}]))
    assert "system: Be brief. user: Why?" in page.text
    assert "not recorded" in page.text
    assert "empty" in page.text


def test_report_replaces_the_old_one(write_run: Write) -> None:
    folder = write_run()
    (folder / REPORT).write_text("old")
    assert write_report(folder).read_text(encoding="utf-8") != "old"
    assert json.loads((folder / "record.json").read_text())["name"] in (folder / REPORT).read_text(encoding="utf-8")
