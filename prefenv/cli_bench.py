"""``prefenv bench`` and ``prefenv report``: run the benchmark, and tell what came out."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Bench:
    """Run agents on experiments with a known best answer, and keep a line of numbers for every run.

    Score: 0 = the untouched reference, 1 = the exact optimum. Ctrl-C loses only the runs under way, and the same
    command goes on. Then: prefenv report. Exit code 1 if runs failed: the others are kept, and the same command
    tries the failed ones again.

    Example: prefenv bench --suite quick --agents ppo your_package.awr:AWR

    Args:
        suite: ``quick`` = basic, few and pairs with 3 seeds; ``full`` = everything with its own number of seeds.
        agents: Which, by name or ``module:Class``, settings may follow; default: all that are known.
        experiments: Which; default: the suite's.
        task: Run them on this task, with its reference and oracle (basic, few, pairs, mistakes, noisy, coarse);
            rows go to files of their own, basic@TASK.jsonl.
        seeds: How many seeds each; default: the suite's.
        first_seed: The first of them.
        engine: ``local`` = processes of this machine; ``ray`` = a Ray cluster (pip install 'prefenv[ray]';
            ray start --head, and ray start --address=... on every other machine).
        workers: Runs at a time, one thread each; None = one per core.
        out: Folder of the results.
        again: Do anew what has a line already, from empty run directories; the new line takes the old one's place.
        work: Folder of the run directories; None = OUT/work. With Ray, one that all machines share lets killed
            runs go on where they stopped; else they start anew.
        json: Print what was done as one JSON object, and nothing else, on stdout.
    """

    suite: Literal["quick", "full"] = "quick"
    agents: tuple[str, ...] = ()
    experiments: tuple[str, ...] = ()
    task: str | None = None
    seeds: int | None = None
    first_seed: int = 0
    engine: Literal["local", "ray"] = "local"
    workers: int | None = None
    out: Path = Path("runs/bench")
    again: bool = False
    work: Path | None = None
    json: bool = False

    def run(self) -> int:
        """Run what is missing."""
        # By name, and late, as below: what benchmarks need takes a second that other commands need not wait.
        return importlib.import_module("benchmarks.bench").bench(self)


@dataclass(frozen=True)
class Report:
    """Make tables and figures from the rows that prefenv bench has written.

    Scores with their intervals, radars, learning curves, reward against KL with the frontier, who beats whom, what
    failed, and the command of every run: as report.md with its figures, and as one page, report.html.

    Args:
        results: Folder of the rows, a .jsonl file for each experiment.
        task: Report what was run with --task TASK; default: the experiments as they stand.
        out: Folder of the report; default: report/ or report@TASK/ in that of the rows.
        json: Print the scores as one JSON object, and nothing else, on stdout.
    """

    results: Path = Path("runs/bench")
    task: str | None = None
    out: Path | None = None
    json: bool = False

    def run(self) -> int:
        """Make it."""
        # By name, and late: the statistics and figures take a second that other commands need not wait.
        folder = self.out or self.results / (f"report@{self.task}" if self.task else "report")
        written = importlib.import_module("benchmarks.report").write(
            self.results, folder, self.task
        )
        print(json.dumps(written) if self.json else f"written to {folder / 'report.html'}")
        return 0
