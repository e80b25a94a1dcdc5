"""The page: values of a run folder into one HTML file that needs nothing but a browser.

No scripts, no requests (the page forbids both to itself by its Content-Security-Policy), no clock: the same folder
gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jinja2

from loratune.files import write_bytes
from loratune.report import figures, sections, words
from loratune.report.curves import Curves, Series, curves_of, outcome_of
from loratune.report.folder import METRICS, SAMPLES, Run, read_run

REPORT = "report.html"
_TEMPLATE = "report.html.jinja"
_SHOWN_PLACES = 12
_NUMBERED_LAYERS = 40  # with more columns, a number no longer fits its cell


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder; whatever a run has not recorded is named as missing.

    Returns:
        the path of the page.

    Raises:
        RunFolderError: there is no record, or a file of the folder holds something else than a run writes.
    """
    path = folder / REPORT
    write_bytes(path, page_of(read_run(folder), name=folder.resolve().name).encode())
    return path


def page_of(run: Run, *, name: str) -> str:
    """The HTML of a run; `name` is used where the record has none."""
    # A half of a surrogate pair is legal in JSON and not in UTF-8.
    return _environment().get_template(_TEMPLATE).render(_context(run, name)).encode(errors="replace").decode()


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("loratune.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for function in (words.count, words.counted, words.loss, words.perplexity, words.percent, words.date, words.place):
        environment.filters[function.__name__] = function
    return environment


def _context(run: Run, name: str) -> dict[str, Any]:
    record = run.record
    curves = curves_of(run)
    outcome = outcome_of(run, curves)
    title = record.name or name
    path = sections.run_path(record, title)
    ranks = [item for item in record.adapter.effective_rank if item.effective is not None]
    return {
        "title": title,
        "record": record,
        "headline": words.headline(run, outcome),
        "missing": _missing(run),
        "tiles": sections.tiles(run, outcome),
        "check_groups": sections.check_groups(record.checks),
        "curves": curves,
        "loss_figures": _loss_figures(curves, words.headline(run, outcome).text),
        "small_figures": _small_figures(run, curves),
        "answers": None if run.samples is None else sections.answers(run.samples),
        "heat": sections.heat(record.adapter),
        "is_numbered": len(ranks) and max(len(heat.layers) if (heat := sections.heat(record.adapter)) else 0, 0) <= _NUMBERED_LAYERS,
        "rank_line": words.effective_rank_line([i.effective for i in ranks if i.effective is not None], [i.r for i in ranks if i.r]) if ranks else "",
        "comparisons": sections.comparisons(record),
        "plan_facts": sections.plan_facts(record),
        "data_facts": sections.data_facts(record.data),
        "data_places": sections.data_places(record.data),
        "shown_places": _SHOWN_PLACES,
        "setting_groups": sections.setting_groups(record.settings),
        "given": sum(setting.is_given for setting in record.settings.values()),
        "origin_facts": sections.origin_facts(record),
        "machine_facts": sections.machine_facts(record),
        "commands": sections.commands(path),
        "python_lines": sections.python_lines(path, record.base.name),
    }
