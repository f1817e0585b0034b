"""Figures that read on white and on dark: mid-tone colours, no background, and ink in the page's own colour."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Mapping
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.report_rows import Bench
from prefenv import plotting
from prefenv.plotting import BLUE, GREEN, RED

INK = "#123456"  # stands for the page's own ink while matplotlib draws
COLORS = (
    BLUE,
    RED,
    GREEN,
    "#c77700",
    "#9a62c7",
    "#1b9aaa",
    "#d1559b",
)  # 3:1 on white and on #14171c
LINES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
MARKERS = ("o", "s", "^")
THEME = "svg{color:#24292f}@media (prefers-color-scheme:dark){svg{color:#d9dde3}}"


@contextlib.contextmanager
def style():
    """The house's settings, with ink that follows the page."""
    inked = (
        "text.color",
        "axes.edgecolor",
        "axes.labelcolor",
        "xtick.color",
        "ytick.color",
        "grid.color",
    )
    settings: dict[Any, Any] = {**dict.fromkeys(inked, INK), "svg.hashsalt": "prefenv"}
    settings |= {"xtick.labelsize": 7, "ytick.labelsize": 7, "axes.titlesize": 9}
    with plotting.style(), matplotlib.rc_context(settings):
        yield


def look(bench: Bench, agent: str) -> dict[str, Any]:
    """Colour, line and marker of an agent, the same in every figure."""
    rank = bench.agents.index(agent)
    group = rank // len(COLORS) % len(LINES)
    return {
        "color": COLORS[rank % len(COLORS)],
        "linestyle": LINES[group],
        "marker": MARKERS[group],
    }


def sample(**options: Any) -> Line2D:
    """A line or marker for a legend."""
    settings: dict[str, Any] = {"markersize": 4, "linewidth": 1.3, **options}
    return Line2D([], [], **settings)


def sheet(
    count: int,
    columns: int,
    panel: tuple[float, float],
    *,
    xlabel: str = "",
    ylabel: str = "",
    handles: Mapping[str, Line2D] | None = None,
    **options: Any,
) -> tuple[Figure, list[Any]]:
    """A figure of small panels in rows, and their axes; laid out by hand, since an engine takes seconds.

    Args:
        count: Panels.
        columns: The most in one row.
        panel: Width and height of one in inches, its title and tick labels included.
        xlabel: Below all.
        ylabel: Beside all.
        handles: A legend below all, by label.
        options: For ``Figure.subplots``.
    """
    columns, handles = min(columns, count), handles or {}
    rows, left = math.ceil(count / columns), 0.5 if ylabel else 0.1
    width, right = left + columns * panel[0], 0.1
    across = max(2, int(width / 1.2))
    legend = 0.19 * math.ceil(len(handles) / across) + 0.1 if handles else 0.0
    below = legend + (0.35 if xlabel else 0.1)
    height = below + rows * panel[1]
    figure = Figure(figsize=(width, height))
    gap = (0.3, 0.38 if options.get("sharex") else 0.5)  # between panels: tick labels, titles
    axes = figure.subplots(
        rows, columns, squeeze=False, **options,
        gridspec_kw={
            "left": (left + gap[0] - right) / width, "right": 1 - right / width,
            "bottom": (below + 0.12) / height, "top": 1 - 0.26 / height,
            "wspace": gap[0] / (panel[0] - gap[0]), "hspace": gap[1] / (panel[1] - gap[1]),
        },
    ).ravel()  # fmt: skip
    for spare in axes[count:]:
        spare.remove()
    middle = (left + width) / 2 / width
    figure.text(middle, legend / height, xlabel, ha="center", va="bottom")
    figure.text(0.02, (below + height) / 2 / height, ylabel, rotation=90, va="center")
    if handles:
        figure.legend(
            list(handles.values()), list(handles), loc="lower center", ncols=across,
            bbox_to_anchor=(0.5, 0.0), borderaxespad=0.2, handlelength=2.4, columnspacing=1.2, fontsize=8,
        )  # fmt: skip
    return figure, list(axes[:count])


def handles(bench: Bench) -> dict[str, Line2D]:
    """Legend of all agents."""
    return {agent: sample(**look(bench, agent)) for agent in bench.agents}


def svg(figure: Figure, name: str, alt: str) -> str:
    """The figure as one ``<svg>`` element, which may stand in a page beside others or in a file of its own.

    Args:
        figure: Drawn inside ``style()``.
        name: Goes before every id, so that two figures of one page do not meet.
        alt: What a person who cannot see it should know.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(id="|"#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    head = f'<svg role="img" aria-label="{escape(alt)}" '
    return text.replace("<svg ", head, 1)


def standalone(drawing: str) -> str:
    """A file's worth of an ``svg``: with the ink of a page that is white or dark."""
    end = drawing.index(">") + 1
    return f"{drawing[:end]}<style>{THEME}</style>{drawing[end:]}"
