"""``prefenv label``: answers to samples that lie ready, on a page in the browser."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from prefenv.registry import lookup


@dataclass(frozen=True)
class Label:
    """Serve a page on which people judge the samples of a folder; several at once, in their browsers.

    Every answer is on the disk before it is acknowledged; the same command goes on where it was stopped.

    Example: prefenv sample --count 512 --out labels; prefenv label labels; prefenv align --feedback labels

    Args:
        folder: Folder with a feedback.sqlite of samples and panels, as prefenv sample makes it; or such a file.
        overlap: Annotators who answer each panel.
        repeats: Share of questions that are hidden repeats, in [0, 1): they measure self-consistency.
        port: Port of the page; 0 = any that is free.
        host: Interface to serve; another than this machine's own only with --expose.
        expose: Let other machines answer. The link is the only lock, and nothing is encrypted.
        json: Print the closing summary as one JSON object, and nothing else, on stdout; the rest goes to stderr.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    overlap: int = 1
    repeats: float = 0.05
    port: int = 8765
    host: str = "127.0.0.1"
    expose: bool = False
    json: bool = False

    def run(self) -> int:
        """Serve it."""
        settings = {k: getattr(self, k) for k in ("overlap", "repeats", "port", "host", "expose")}
        out = sys.stderr if self.json else sys.stdout
        summary = lookup("oracle", "web").label(self.folder, out, **settings)
        if self.json:
            print(json.dumps(summary))
        else:
            told = summary["agreement"]
            print(
                f"{summary['answered']} of {summary['panels']} panels answered by {len(summary['annotators'])} "
                f"annotators; Krippendorff's alpha {_number(told['alpha'])}, the same answer when asked again "
                f"{_number(told['consistent'])} ({told['repeated']} repeats); {summary['feedback']}"
            )
        return 0


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
