"""Samples drawn in text, side by side: in braille, or in ASCII where the terminal has no braille."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TextIO

import numpy as np

from prefenv import plotting
from prefenv.tasks import Task

Color = Literal["red", "green", "plain"]
_ANSI = {"red": "31", "green": "32", "plain": "0"}
_SMALL, _LARGE, _GAP = 12, 28, 2  # columns of a sample, and between two
_UPPER, _LOWER = 0x1B, 0xE4  # braille's dots of the upper and the lower half of a character


def ascii_dots(braille: str) -> str:
    """Braille as ``'``, ``.`` and ``:``, for the upper half, the lower half and both."""

    def one(c: str) -> str:
        dots = ord(c) - 0x2800
        if not 0 <= dots < 256:
            return c
        return " '.:"[bool(dots & _UPPER) + 2 * bool(dots & _LOWER)]

    return "".join(map(one, braille))


def sheet(
    task: Task, samples: Any, labels: Sequence[str] = (), width: int = 80, braille: bool = True
) -> list[str]:
    """Samples ``(n, *event_shape)`` as lines of text, side by side, in as many rows as ``width`` columns need.

    Args:
        task: What they are.
        samples: Tensor or array.
        labels: A word above each.
        width: Columns of the page.
        braille: Braille; else ASCII.
    """
    samples = np.asarray(samples.cpu() if hasattr(samples, "cpu") else samples)
    most = max(1, (width + _GAP) // (_SMALL + _GAP))
    across = -(-len(samples) // -(-len(samples) // most))  # rows of equal length
    columns = max(4, min(_LARGE, (width + _GAP) // across - _GAP))
    pictures = [plotting.text(task, x, columns, columns // 2).split("\n") for x in samples]
    pictures = [[line.replace("\u2800", " ") for line in picture] for picture in pictures]
    if not braille:
        pictures = [[ascii_dots(line) for line in picture] for picture in pictures]
    if labels:
        pictures = [[str(w).center(columns), *p] for w, p in zip(labels, pictures, strict=True)]
    rows = [pictures[i : i + across] for i in range(0, len(pictures), across)]
    return [(" " * _GAP).join(parts) for row in rows for parts in zip(*row, strict=True)]


@dataclass(frozen=True)
class Page:
    """Where text goes.

    Args:
        out: The stream.
        colors: ANSI colours.
        braille: Braille; else ASCII.
    """

    out: TextIO
    colors: bool
    braille: bool

    @classmethod
    def of(cls, out: TextIO, environ: Any) -> Page:
        """A page that suits a stream: colours only on a terminal (and without ``NO_COLOR``), braille if it can."""
        colors = out.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"
        try:
            "⠿·".encode(getattr(out, "encoding", None) or "ascii")
        except (UnicodeEncodeError, LookupError):
            return cls(out, colors, False)
        return cls(out, colors, True)

    def say(self, text: str = "", color: Color = "plain", end: str = "\n") -> None:
        """Print at once, in a colour."""
        paint = self.colors and color != "plain"
        self.out.write((f"\x1b[{_ANSI[color]}m{text}\x1b[0m" if paint else text) + end)
        self.out.flush()

    def draw(self, task: Task, samples: Any, color: Color, labels: Sequence[str] = ()) -> None:
        """Print samples ``(n, *event_shape)`` side by side."""
        width = shutil.get_terminal_size((80, 24)).columns
        for line in sheet(task, samples, labels, width - 1, self.braille):
            self.say(line.rstrip(), color)
