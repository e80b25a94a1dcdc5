"""The page: values of a run folder into one HTML file that needs nothing but a browser.

No scripts, no requests (the page forbids itself both by its Content-Security-Policy), no clock: the same folder gives
the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from loratune.files import write_bytes
from loratune.report import figures, sections, words
from loratune.report.curves import Curves, curves_of, outcome_of
from loratune.report.folder import METRICS, RECORD, SAMPLES, Run, read_run
from loratune.report.ranks import ranks_of, smaller_line

REPORT = "report.html"
_TEMPLATE = "report.html.jinja"
_SHOWN_PLACES = 12


def write_report(folder: Path, record: Mapping[str, Any] | None = None) -> Path:
    """Write `report.html` into a run folder; whatever the run has not recorded is named as missing.

    Args:
        record: what `record.json` is about to hold; else it is read.

    Returns:
        the path of the page.

    Raises:
        RunFolderError: there is no record, or a file of the folder holds something else than a run writes.
    """
    path = folder / REPORT
    write_bytes(path, page_of(read_run(folder, record), name=folder.resolve().name))
    return path


def page_of(run: Run, *, name: str) -> bytes:
    """The HTML of a run in UTF-8; `name` serves where the record has none."""
    return rendered(_TEMPLATE, _context(run, name))


def rendered(template: str, context: Mapping[str, Any]) -> bytes:
    """A page in UTF-8."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("loratune.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for function in (words.count, words.counted, words.loss, words.perplexity, words.percent, words.date):
        environment.filters[function.__name__] = function
    # Half of a surrogate pair is legal in JSON but not in UTF-8.
    return environment.get_template(template).render(context).encode(errors="replace")


def _context(run: Run, name: str) -> dict[str, Any]:
    record = run.record
    curves = curves_of(run)
    outcome = outcome_of(run, curves)
    title = record.name or name
    path = sections.run_path(record, title)
    headline = words.headline(run, outcome)
    return {
        "title": title,
        "record": record,
        "headline": headline,
        "not_there": _not_there(run),
        "tiles": sections.tiles(run, outcome),
        "check_groups": sections.check_groups(record.checks),
        "curves": curves,
        "held_out": list(zip(curves.held_out.steps, curves.held_out.values, strict=True)),
        "loss_figures": _loss_figures(curves, headline.text),
        "small_figures": _small_figures(run, curves),
        "matches": sections.matches(sections.answers(run.samples or ())),
        "answers": None if run.samples is None else sections.answers(run.samples),
        "ranks": ranks_of(record.adapter.effective_rank),
        "smaller": smaller_line(record.adapter),
        "comparisons": sections.comparisons(record),
        "plan_facts": sections.plan_facts(record),
        "data_facts": sections.data_facts(record.data, record.task),
        "data_places": sections.data_places(record.data),
        "shown_places": _SHOWN_PLACES,
        "setting_groups": sections.setting_groups(record.settings),
        "given": sum(setting.is_given for setting in record.settings.values()),
        "origin_facts": sections.origin_facts(record),
        "machine_facts": sections.machine_facts(record),
        "commands": sections.commands(path, record.task),
        "python_lines": sections.python_lines(path, record.base.name, record.task),
    }


def _not_there(run: Run) -> list[str]:
    """Whole parts that the folder lacks, and what was left out of those it has."""
    record = run.record
    parts = (
        (run.metrics is not None, f"There is no {METRICS}: no curves."),
        (run.samples is not None, f"There is no {SAMPLES}: no answers to compare."),
        (bool(record.checks), f"{RECORD} has no checks."),
        (record.state != "finished" or record.result.steps is not None, f"{RECORD} has no result."),
    )
    return [*run.damage, *(sentence for is_there, sentence in parts if not is_there)]


def _loss_figures(curves: Curves, outcome: str) -> list[tuple[str, str]]:
    """(CSS class, SVG): the same curves for a wide and for a narrow page; the reader's screen shows one of them."""
    if not curves.loss and not curves.held_out:
        return []
    label = f"Loss over steps. {outcome}"
    sizes = (("wide", 1000, 340), ("narrow", 420, 300))
    return [(name, figures.loss_figure(curves, label, width=w, height=h)) for name, w, h in sizes]


def _small_figures(run: Run, curves: Curves) -> list[tuple[str, str, str]]:
    """(title, note, SVG) of each further curve there is something to draw of."""
    clip = run.record.settings.get("clip")
    limit = clip.value if clip and isinstance(clip.value, int | float) and clip.value > 0 else None
    clipped = f"clipped at {limit:g}" if limit else ""
    memory = run.record.hardware.memory_bytes
    available = f"of {words.size(memory)}" if memory else ""
    in_one_unit = words.size_like(max(curves.memory.values, default=0))
    rows = (
        ("Learning rate", "", curves.lr, words.rate, words.rate, None, False),
        ("Gradient norm", clipped, curves.grad_norm, words.short, words.short, limit, True),
        ("Tokens a second", "", curves.speed, words.short, words.short, None, True),
        ("Peak memory", available, curves.memory, words.size, in_one_unit, None, False),
    )
    found = []
    for title, note, series, text, tick, line, is_noisy in rows:
        if not series:
            continue
        first, last = text(series.values[0]), text(series.values[-1])
        label = f"{title} over steps: {first} at first, {last} at the end, {text(max(series.values))} at most"
        svg = figures.small_figure(series, label, format_tick=tick, limit=line, is_noisy=is_noisy)
        found.append((title, note, svg))
    return found
