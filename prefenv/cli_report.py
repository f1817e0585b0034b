"""``prefenv report``: tables and figures from the rows of a benchmark."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Report:
    """Make tables and figures from the rows that prefenv bench has written.

    Scores with their intervals, radars, learning curves, reward against KL with the frontier, who beats whom, what
    failed, and the command of every run: as report.md with its figures, and as one page, report.html.

    Args:
        results: Folder of the rows, a .jsonl file for each experiment.
        out: Folder of the report; default: report/ in that of the rows.
        json: Print the scores as one JSON object, and nothing else, on stdout.
    """

    results: Path = Path("runs/bench")
    out: Path | None = None
    json: bool = False

    def run(self) -> int:
        """Make it."""
        # By name, and late: the statistics and figures take a second that other commands need not wait.
        folder = self.out or self.results / "report"
        written = importlib.import_module("benchmarks.report").write(self.results, folder)
        print(json.dumps(written) if self.json else f"written to {folder / 'report.html'}")
        return 0
