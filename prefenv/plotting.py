"""One style for every figure. Colours: the reference is red, the aligned model green, the optimum blue."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefenv.tasks import Task

RED, GREEN, BLUE, GREY = "#c8372d", "#2a9d5c", "#2f6fb3", "#8a8f98"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
    "legend.frameon": False,
}


@contextlib.contextmanager
def style():
    """The house's matplotlib settings, for the time of a ``with``."""
    with matplotlib.rc_context(STYLE):
        yield


def sheet(
    task: Task,
    rows: Sequence[np.ndarray],
    colors: Sequence[str],
    labels: Sequence[str] | None = None,
    size: float = 0.85,
    heads: Sequence[str] = (),
) -> Figure:
    """A contact sheet: one row of samples for each of ``rows`` ``(n, *event_shape)``, in its colour.

    ``labels`` name the rows, ``heads`` the columns.
    """
    columns = max(len(r) for r in rows)
    wide = [TextPath((0, 0), label, size=10).get_extents().width / 72 for label in labels or ()]
    margin = max(1.0, 0.2 + 1.06 * max(wide)) if wide else 0.0  # pixels make letters a little wider
    head = 0.3 if heads else 0.0
    high = head + size * len(rows)
    figure = Figure(figsize=(margin + size * columns, high))
    figure.set_layout_engine("none")
    width, left = size * columns / (margin + size * columns), margin / (margin + size * columns)
    line = size / high
    for j, name in enumerate(heads):
        x, y = left + width * (j + 0.5) / columns, 1 - head / high / 2
        figure.text(x, y, name, ha="center", va="center", color=GREY, fontsize=10)
    for i, (row, color) in enumerate(zip(rows, colors, strict=True)):
        bottom = line * (len(rows) - i - 1)
        for j, sample in enumerate(row):
            box = (left + width * j / columns, bottom, width / columns, line)
            axes = figure.add_axes(box)
            axes.set_axis_off()
            task.draw(axes, sample, color)
        if labels:
            y = bottom + line / 2
            x = left * (1 - 0.1 / margin)
            figure.text(x, y, labels[i], ha="right", va="center", color=color, fontsize=10)
    return figure


def overlays(
    task: Task,
    groups: Sequence[np.ndarray],
    colors: Sequence[str],
    labels: Sequence[str],
    size: float = 2.2,
    columns: int = 5,
) -> Figure:
    """One picture for each group of samples ``(n, *event_shape)``, drawn over each other, its name above it."""
    columns = min(columns, len(groups))
    lines = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(size * columns, (size + 0.2) * lines), layout="constrained")
    for i, (group, color, label) in enumerate(zip(groups, colors, labels, strict=True)):
        axes = figure.add_subplot(lines, columns, i + 1)
        axes.set_axis_off()
        axes.set_title(label, color=color, fontsize=10)
        task.draw(axes, group, color)
    return figure


def beside(task: Task, a: np.ndarray, b: np.ndarray, columns: int = 4) -> Figure:
    """Model A's samples (red) beside model B's of the same noises (green), each ``(n, *event_shape)``."""
    lines = math.ceil(len(a) / columns)
    figure = Figure(figsize=(1.1 * (2 * columns + 1), 1.1 * lines + 0.3))
    top = 1.1 * lines / (1.1 * lines + 0.3)
    width = 1 / (2 * columns + 1)
    for left, samples, color, name in ((0, a, RED, "model A"), (columns + 1, b, GREEN, "model B")):
        figure.text(
            width * (left + columns / 2), (1 + top) / 2, name, color=color, ha="center", va="center"
        )
        for i, sample in enumerate(samples):
            box = (
                width * (left + i % columns),
                top * (1 - (i // columns + 1) / lines),
                width,
                top / lines,
            )
            axes = figure.add_axes(box)
            axes.set_axis_off()
            task.draw(axes, sample, color)
    return figure


def grid(samples: np.ndarray) -> list[np.ndarray]:
    """Samples split into rows of a nearly square sheet."""
    return np.array_split(samples, range(0, len(samples), math.ceil(math.sqrt(len(samples)))))[1:]


def frame(task: Task, sample: np.ndarray, color: str = RED, pixels: int = 128) -> np.ndarray:
    """One sample as ``(pixels, pixels, 3)`` uint8."""
    figure = sheet(task, [sample[None]], [color], size=1.0)
    figure.set_dpi(pixels)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def text(task: Task, sample: np.ndarray, columns: int = 24, lines: int = 12) -> str:
    """One sample in braille: every character holds 2 x 4 dots."""
    points = task.points2d(sample)
    extent = 2.6
    column = ((points[:, 0] + extent) / (2 * extent) * (2 * columns - 1)).round().astype(int)
    row = ((extent - points[:, 1]) / (2 * extent) * (4 * lines - 1)).round().astype(int)
    cells = np.zeros((lines, columns), int)
    bits = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
    seen = (column >= 0) & (column < 2 * columns) & (row >= 0) & (row < 4 * lines)
    for r, c in zip(row[seen], column[seen], strict=True):
        cells[r // 4, c // 2] |= bits[r % 4, c % 2]
    return "\n".join("".join(chr(0x2800 + cell) for cell in line) for line in cells)


class Window:
    """A matplotlib window that shows samples as they are made; silent where there is no screen."""

    def __init__(self) -> None:
        import matplotlib.pyplot as plt

        self._figure = plt.figure(figsize=(5, 5))
        native = self._figure.canvas.required_interactive_framework is not None
        web = ("nbagg", "webagg", "notebook", "widget", "ipympl")
        self._interactive = native or plt.get_backend().lower().endswith(web)

    def draw(self, task: Task, samples: np.ndarray, color: str = RED) -> None:
        """Show samples ``(n, *event_shape)`` as a sheet."""
        self._figure.clear()
        rows = grid(samples)
        columns = max(len(r) for r in rows)
        for i, row in enumerate(rows):
            for j, sample in enumerate(row):
                axes = self._figure.add_subplot(len(rows), columns, i * columns + j + 1)
                axes.set_axis_off()
                task.draw(axes, sample, color)
        if self._interactive:
            self._figure.canvas.draw_idle()
            self._figure.canvas.start_event_loop(0.001)
            self._figure.show()

    def close(self) -> None:
        """Close the window; twice is harmless."""
        import matplotlib.pyplot as plt

        plt.close(self._figure)
