"""The report of the benchmarks: tables and figures of all rows, as Markdown and as one HTML page.

    prefenv report            of runs/bench, where prefenv bench writes
    make report               of the committed rows, benchmarks/results/bench

Writes ``report.md``, ``report.html`` and the figures. Of the repository's own results, the first figure and a
short table go to the README, between its ``bench`` marks, and the table of all agents to theirs.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import tyro

from benchmarks import agents_page
from benchmarks.pages import update_readme
from benchmarks.report_html import markdown, page, table_lines
from benchmarks.report_rows import Bench, Described, bench, finished, finite, read
from benchmarks.report_sections import appendix, details, overview
from benchmarks.report_style import standalone
from benchmarks.report_tables import score_table, value
from prefenv.cli_bench import Report
from prefenv.errors import RunError
from prefenv.runs import writable

RESULTS = Path(__file__).parent / "results"
TITLE = "Benchmarks with a known answer"


def summary(bench: Bench) -> dict[str, Any]:
    """Scores with their intervals, as plain values (None = no number), by agent."""

    def plain(e: Any) -> list[float | None]:
        return [float(v) if finite(v) else None for v in (e.value, e.low, e.high)]

    return {
        agent: {"all": plain(e)} | {n: plain(bench.scores[agent, n]) for n in bench.variants}
        for agent, e in bench.overall.items()
    }


def readme_lines(bench: Bench) -> tuple[list[str], str]:
    """The README's figure and short table, and the note below."""
    alt = f"Radar charts of {len(bench.agents)} agents over {len(bench.variants)} experiments"
    picture = (
        [f"![{alt}](benchmarks/results/report/radar.svg)", ""] if len(bench.variants) > 2 else []
    )
    seeds = {
        n: len({r["seed"] for r in bench.rows if r["experiment"] == n}) for n in bench.variants
    }
    told = ", ".join(f"{name} {count}" for name, count in seeds.items())
    note = (
        "IQM of the score over seeds, clipped to [0, 1]: 0 = the untouched reference, 1 = the exact optimum; a "
        "refusal counts 0, and of an experiment's variants it is the mean. *All*: over all experiments, with its "
        f"95 % interval from five seeds on. Seeds so far: {told}. Bold: the best, its interval beyond all "
        "others'. Made by `prefenv bench` and `prefenv report`; "
        "intervals, curves, failures and commands: [the report](benchmarks/results/report/report.md)."
    )
    return [*picture, *table_lines(score_table(bench, value))], note


def known_experiments(task: str | None = None) -> dict[str, Described]:
    """The experiments by name, in their order, as they are called on a task."""
    home = importlib.import_module("benchmarks.experiments")
    return {
        home.on_task(n, task): Described(home.question(n), tuple(home.load(n).variants))
        for n in home.NAMES
    }


def load(folder: Path, task: str | None = None) -> tuple[Bench, dict[str, Any]]:
    """Rows and frontiers of a folder of results: those on one task, None = the experiments as they stand.

    Raises:
        RunError: There are no such rows, or a file cannot be read.
    """
    path = folder / "frontier.json"
    try:
        frontiers = dict(json.loads(path.read_bytes())) if path.exists() else {}
    except (ValueError, TypeError):
        raise RunError(f"{path}: these are no frontiers") from None
    return bench(read(folder, task), known_experiments(task)), frontiers


def write(results: Path, out: Path, task: str | None = None) -> dict[str, Any]:
    """Read the rows in ``results`` and write the report to ``out``; the scores and the names of the files."""
    found, frontiers = load(results, task)
    sections = [*overview(found), *details(found, frontiers), *appendix(found)]
    writable(out)
    files = {"report.md": markdown(TITLE, sections), "report.html": page(TITLE, sections)}
    for section in sections:
        if section.figure:
            files[f"{section.figure.name}.svg"] = standalone(section.figure.svg)
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    readme = RESULTS.parents[1] / "README.md"
    if out.resolve() == RESULTS / "report" and readme.exists():
        update_readme(readme, *readme_lines(found), name="bench")
        basic = [r for r in found.rows if r["experiment"] == "basic"]
        if any(map(finished, basic)):
            update_readme(readme.parent / "agents" / "README.md", *agents_page.table(basic))
    return {"agents": summary(found), "files": [str(out / name) for name in files]}


def main() -> None:
    """The report from ``python -m benchmarks.report``."""
    tyro.cli(Report, description=__doc__).run()


if __name__ == "__main__":
    main()
