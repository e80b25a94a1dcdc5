"""The page of a comparison: what each method costs and gives, from `comparison.json` alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratune.errors import RunFolderError
from loratune.files import write_bytes
from loratune.report import figures, words
from loratune.report.curves import Series
from loratune.report.page import rendered

CONTENT, PAGE = "comparison.json", "comparison.html"
_FORMAT = 1
_SHOWN_ANSWERS = 4
_AXES = (("tokens", "tokens trained on"), ("flops", "floating-point operations"), ("seconds", "seconds of training"))


def write_comparison(folder: Path) -> Path:
    """Write `comparison.html` into the folder of a comparison.

    Raises:
        RunFolderError: there is no comparison, or one of another format.
    """
    try:
        found = json.loads((folder / CONTENT).read_bytes())
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"{folder / CONTENT}: {error}", hint="name a folder that `loratune compare` wrote"
        ) from None
    if not isinstance(found, Mapping) or found.get("format") != _FORMAT:
        raise RunFolderError(f"{folder / CONTENT} has another format", hint="use the loratune that wrote it")
    path = folder / PAGE
    write_bytes(path, rendered("comparison.html.jinja", context_of(found)))
    return path


def context_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows."""
    methods = found["methods"]
    verdict = found["verdict"]
    tone = "good" if verdict["regressed"] is False and not verdict["failed"] else "bad"
    return {
        "found": found,
        "title": f"{verdict['first']} against {verdict['other']}",
        "headline": {"text": verdict["text"] + ".", "tone": tone},
        "rows": rows_of(found),
        "heads": heads_of(found),
        "legend": [
            {"name": name, "colour": figures.LINE_COLOURS[number % len(figures.LINE_COLOURS)], "dash": _dash(number)}
            for number, name in enumerate(methods)
        ],
        "figures": [_race(found, key, axis) for key, axis in _AXES],
        "searches": {name: _search(method["search"]) for name, method in methods.items()},
        "samples": _samples(found),
        "loss": words.loss,
    }


def heads_of(found: Mapping[str, Any]) -> list[str]:
    """What stands above the columns of the table; the base with its format where that is not every run's."""
    own = found["base"].get("quant")
    return [f"base, {own or 'unquantised'}" if own or _of_another_base(found) else "base", *found["methods"]]


def _of_another_base(found: Mapping[str, Any]) -> bool:
    """Whether some run's base is kept in another format than the one that was measured."""
    runs = [run for method in found["methods"].values() for run in method["runs"] if "failed" not in run]
    return any(run.get("quant") != found["base"].get("quant") for run in runs)


def rows_of(found: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(what, its text for the base and each method): the table that the page and the command show."""
    base, summaries = found["base"], [method["summary"] for method in found["methods"].values()]
    runs = [method["runs"] for method in found["methods"].values()]

    def line(name: str, key: str, text: Callable[[float], str], of_base: Any = None) -> tuple[str, list[str]]:
        cells = [_spread(summary.get(key), text) for summary in summaries]
        return name, ["–" if of_base is None else text(of_base), *cells]

    def to_goal(key: str, text: Callable[[float], str]) -> list[str]:
        return ["–", *(_reached([run["to_goal"] for run in of_method], key, text) for of_method in runs)]

    def figure(value: float) -> str:
        return f"{value:.4f}"

    race = (
        []
        if found["goal"] is None
        else [
            (f"tokens to a loss of {found['goal']:.4f}", to_goal("tokens", words.short)),
            ("operations to it", to_goal("flops", lambda value: f"{value:.2g}")),
            ("time to it", to_goal("seconds", words.duration)),
        ]
    )
    before = [line("held-out loss before training", "base_val_loss", figure)] if _of_another_base(found) else []
    table = [
        *before,
        line("held-out loss", "val_loss", figure, base.get("val_loss")),
        line("exact answers", "exact_match", words.percent, base.get("exact_match")),
        line("loss on other text", "elsewhere_loss", figure, base.get("elsewhere_loss")),
        line("trained parameters", "trainable", words.short),
        line("peak memory of the process", "peak_memory_bytes", words.size),
        line("size on disk", "adapter_bytes", words.size),
        line("time of training", "seconds", words.duration),
        *race,
        ("learning rate", ["–", *(words.rate(method["search"]["lr"]) for method in found["methods"].values())]),
        ("search for it", ["–", *(_cost(method["search"]) for method in found["methods"].values())]),
    ]
    return [(name, cells) for name, cells in table if any(cell != "–" for cell in cells)]


def _spread(summary: Mapping[str, float] | None, text: Callable[[float], str]) -> str:
    if summary is None:
        return "–"
    mean, least, most = (text(summary[name]) for name in ("mean", "least", "most"))
    return mean if least == most else f"{mean} ({least} to {most})"


def _reached(points: Sequence[Mapping[str, float] | None], key: str, text: Callable[[float], str]) -> str:
    """The mean of those runs that came there."""
    values = [point[key] for point in points if point is not None]
    if not values:
        return "not reached"
    mean = text(sum(values) / len(values))
    return mean if len(values) == len(points) else f"{mean} ({len(values)} of {len(points)} runs)"


def _cost(search: Mapping[str, Any]) -> str:
    return f"{len(search['tried'])} runs, {words.duration(search['seconds'])}" if search["tried"] else "given"


def _search(search: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (words.rate(one["lr"]), "diverged" if one["val_loss"] is None else f"{one['val_loss']:.4f}")
        for one in search["tried"]
    ]


def _race(found: Mapping[str, Any], key: str, axis: str) -> tuple[str, str]:
    lines = []
    for number, method in enumerate(found["methods"].values()):
        for run in method["runs"]:
            points = run.get("curve", ())[1:]  # the base's loss would hide the rest
            steps, values = (tuple(point[name] for point in points) for name in (key, "val_loss"))
            lines.append((number, Series(steps, values)))
    label = f"Held-out loss over {axis}, of each run"
    return axis, figures.race_figure(lines, label, goal=found["goal"], axis=axis, width=470, height=260)


def _dash(number: int) -> str:
    return " ".join(map(str, figures.DASHES[number // len(figures.LINE_COLOURS) % len(figures.DASHES)]))


def _samples(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first answers of the base and of each method's first run, beside the reference."""
    answers: dict[str, Sequence[Mapping[str, Any]]] = {"base": found["base"].get("answers", ())}
    answers |= {name: method["runs"][0].get("answers", ()) for name, method in found["methods"].items()}
    first = next((given for given in answers.values() if given), ())
    return [
        {
            "prompt": row["prompt"],
            "answers": [
                ("reference", row["reference"] or ""),
                *((name, given[number]["output"]) for name, given in answers.items() if number < len(given)),
            ],
        }
        for number, row in enumerate(first[:_SHOWN_ANSWERS])
    ]
