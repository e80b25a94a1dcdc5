"""Curves as SVG that sits in the page: its colours are the page's CSS variables, its text is text.

One figure fits light and dark paper that way, and the reader's own font. No pyplot, no ids that two figures could
share, no dates: the same run gives the same bytes.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loratune.report.curves import Curves, Series, extremes, smooth, thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-ins while drawing; the colour after the comma serves where the page's variables are out of reach.
_TRAIN, _HELD_OUT, _BASE, _INK, _LINE, _PAPER, _THIRD, _FOURTH = (f"#a1b2c{digit}" for digit in range(8))
_COLOURS = {
    _TRAIN: "var(--train, #3f74b5)",
    _HELD_OUT: "var(--held-out, #c8622b)",
    _BASE: "var(--muted, #7d7d7d)",
    _INK: "var(--muted, #7d7d7d)",
    _LINE: "var(--line, #c4c4c4)",
    _PAPER: "var(--paper, #ffffff)",
    _THIRD: "var(--good, #17713f)",
    _FOURTH: "var(--warn, #8a5a00)",
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "loratune",
    "font.family": "sans-serif",
    "font.size": 12.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.edgecolor": _LINE,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}
# Of lines that are to be told apart, in their order; more than these are dashed in the same colours.
LINE_COLOURS = tuple(_COLOURS[colour] for colour in (_TRAIN, _HELD_OUT, _THIRD, _FOURTH))
DASHES = ((), (5, 3), (1.5, 2.5))
_DOTTED = 60  # validations that can still be told apart as dots
_MARGIN_LEFT, _MARGIN_RIGHT, _MARGIN_TOP, _MARGIN_BOTTOM = 50, 14, 10, 38


def loss_figure(curves: Curves, label: str, *, width: int, height: int) -> str:
    """Training loss, each step pale and smoothed strong; held-out loss; the base model's as a dashed line."""
    with _figure(width, height) as (figure, axes):
        if curves.loss:
            raw, smoothed = extremes(curves.loss), smooth(curves.loss)
            axes.plot(raw.steps, raw.values, color=_TRAIN, alpha=0.4, linewidth=1)
            axes.plot(smoothed.steps, smoothed.values, color=_TRAIN, linewidth=2.2, **_dot_of(smoothed))
        if curves.base is not None:
            axes.axhline(curves.base, color=_BASE, linewidth=1.2, linestyle=(0, (5, 4)))
        if curves.held_out:
            points = thin(curves.held_out)
            dots: dict[str, Any] = {"marker": "o", "markersize": 6, "markeredgecolor": _PAPER, "markeredgewidth": 1.2}
            dots = dots if len(points.steps) <= _DOTTED else {}
            axes.plot(points.steps, points.values, color=_HELD_OUT, linewidth=2.2, **dots)
        low, high = _loss_range(curves)
        axes.set_ylim(low, high)
        _name_steps(axes)
        return _svg(figure, label)


def small_figure(
    series: Series,
    label: str,
    *,
    format_tick: Callable[[float], str],
    limit: float | None = None,
    is_noisy: bool = False,
) -> str:
    """One curve over the steps; `limit` is a dashed line where it is near, `is_noisy` makes each step pale."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with _figure(450, 205) as (figure, axes):
        if is_noisy:
            raw = extremes(series)
            axes.plot(raw.steps, raw.values, color=_TRAIN, alpha=0.4, linewidth=1)
        line = smooth(series) if is_noisy else thin(series)
        axes.plot(line.steps, line.values, color=_TRAIN, linewidth=2, **_dot_of(line))
        top = min(max(series.values), 3 * _most(series))
        if limit is not None and limit <= 3 * top:
            axes.axhline(limit, color=_BASE, linewidth=1.2, linestyle=(0, (5, 4)))
            top = max(top, limit)
        axes.set_ylim(0, top * 1.08 if top > 0 else 1)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
        _name_steps(axes)
        return _svg(figure, label)


def race_figure(
    lines: Sequence[tuple[int, Series]], label: str, *, goal: float | None, axis: str, width: int, height: int
) -> str:
    """Losses of several runs over what they took, each with its method's number; `goal`, if any, is a dashed line."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    colours = (_TRAIN, _HELD_OUT, _THIRD, _FOURTH)
    with _figure(width, height) as (figure, axes):
        if goal is not None:
            axes.axhline(goal, color=_BASE, linewidth=1.2, linestyle=(0, (5, 4)))
        for number, series in lines:
            dash = DASHES[number // len(colours) % len(DASHES)]
            style: Any = (0, dash) if dash else "-"
            colour = colours[number % len(colours)]
            axes.plot(series.steps, series.values, color=colour, linewidth=2, linestyle=style, marker="o", markersize=4)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel(axis, labelpad=3)
        return _svg(figure, label)


def _dot_of(series: Series) -> dict[str, Any]:
    """One step makes no line: it is drawn as a dot."""
    return {"marker": "o"} if len(series.steps) == 1 else {}


def _loss_range(curves: Curves) -> tuple[float, float]:
    """Low and high of what matters: a single spike of the raw training loss runs off the top."""
    shown = [*smooth(curves.loss).values, *curves.held_out.values]
    if curves.base is not None:
        shown.append(curves.base)
    if curves.loss:
        shown += [min(curves.loss.values), _most(curves.loss)]
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    room = 0.06 * (high - low) or max(0.05, abs(high) * 0.05)
    return max(0.0, low - room) if low >= 0 else low - room, high + room


def _most(series: Series) -> float:
    """The value that 98% of the series do not exceed."""
    return sorted(series.values)[int(0.98 * (len(series.values) - 1))]


def _name_steps(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("step", labelpad=3)


@contextmanager
def _figure(width: int, height: int) -> Iterator[tuple[Figure, Axes]]:
    """A figure of so many CSS pixels, drawn under this file's settings whatever the user's matplotlibrc says."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()
        settings: dict[Any, Any] = _STYLE
        mpl.rcParams.update(settings)
        figure = Figure(figsize=(width / 72, height / 72))  # an SVG unit is 1/72 inch
        FigureCanvasSVG(figure)
        left, bottom = _MARGIN_LEFT / width, _MARGIN_BOTTOM / height
        axes = figure.add_axes((left, bottom, 1 - left - _MARGIN_RIGHT / width, 1 - bottom - _MARGIN_TOP / height))
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.tick_params(length=0, pad=6)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.margins(x=0.015)
        yield figure, axes


def _svg(figure: Figure, label: str) -> str:
    """The drawing as an element of an HTML page, named by `label` for those who do not see it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>| font-family: [^;]*;|<g/>", "", text, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view, "matplotlib writes a viewBox"
    root = f'<svg role="img" aria-label="{html.escape(label)}" {view[0]}>'
    text = re.sub(r"<svg[^>]*>", lambda _: root, text, count=1)
    text = _renamed(text, label)
    for colour, variable in _COLOURS.items():
        text = text.replace(colour, variable)
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _renamed(svg: str, label: str) -> str:
    """Ids are shared by all of a page: those that nothing refers to go, the others get names of this figure's own."""
    prefix = "f" + hashlib.sha256((label + svg).encode()).hexdigest()[:8]
    used = sorted(set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg)))
    names = {name: f"{prefix}-{number}" for number, name in enumerate(used)}
    svg = re.sub(r' id="([^"]*)"', lambda match: f' id="{names[match[1]]}"' if match[1] in names else "", svg)
    svg = re.sub(r"url\(#([^)]+)\)", lambda match: f"url(#{names[match[1]]})", svg)
    return re.sub(r'(?:xlink:)?href="#([^"]+)"', lambda match: f'href="#{names[match[1]]}"', svg)
