"""The page of the experiments that were run on other tasks than shapes: a table for each experiment and task.

    prefenv bench --task gaussians --experiments basic pairs --seeds 1 --out benchmarks/results/tasks
    python -m benchmarks.tasks

Reads ``benchmarks/results/tasks/*.jsonl`` and writes ``tasks.md`` beside them.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.pages import keep, spread
from benchmarks.report_rows import finished, trouble

FOLDER = Path(__file__).parent / "results" / "tasks"
HEAD = [
    "# `basic` and `pairs` on other tasks",
    "",
    "The same experiments with a task's own reference and oracle, by `prefenv bench --task NAME`. **One seed and "
    "a few agents:** it shows that the benchmark runs there and roughly what comes out, and compares nobody. The "
    "agents' defaults were tuned on shapes. Score: 0 = the untouched reference, 1 = the exact optimum, below 0 "
    "further from it than the reference is. *Bound*: what a second sample of the optimum scores.",
]


def told(values: list[float], digits: int) -> str:
    """A number; of several, median and range; of none, that there is none."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "none"
    return spread(values, digits)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown line an agent, best first: of its finished runs, and how many have no score."""
    lines = [
        "| agent | score | bound | preferred rate | residual / reference's | KL (nats) | CPU s | seeds |",
        "|---" * 8 + "|",
    ]
    agents: dict[str, list[dict[str, Any]]] = {r["agent"]: [] for r in rows}
    for row in filter(finished, rows):
        agents[row["agent"]].append(row)

    def rank(item: tuple[str, list[dict[str, Any]]]) -> float:
        return -statistics.median([r["score"] for r in item[1]] or [-math.inf])

    for name, mine in sorted(agents.items(), key=rank):
        others = [r for r in rows if r["agent"] == name and not finished(r)]
        seeds = f"{len(mine)} ({len(others)} failed)" if others else str(len(mine))
        if not mine:
            lines.append(f"| `{name}` | {trouble(others[0])} |" + "  |" * 5 + f" {seeds} |")
            continue
        ratio = [r["residual"] / r["reference_residual"] for r in mine]
        kl = [r["kl_nats"] for r in mine if r["kl_nats"] is not None]
        columns = [
            ([r["score"] for r in mine], 2),
            ([r["optimum_score"] for r in mine], 2),
            ([r["preferred_rate"] for r in mine], 3),
            (ratio, 2),
            (kl, 1),
            ([r["cpu_seconds"] for r in mine], 0),
        ]
        cells = [*(told(values, digits) for values, digits in columns), seeds]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


def page(rows: list[dict[str, Any]]) -> list[str]:
    """A section for each experiment and task."""
    lines = list(HEAD)
    for name in sorted({r["experiment"] for r in rows}, key=lambda n: n.split("@")[::-1]):
        mine = [r for r in rows if r["experiment"] == name]
        rate = next((r["reference_preferred_rate"] for r in mine if finished(r)), float("nan"))
        lines += [
            "",
            f"## `{name}`",
            "",
            *table(mine),
            "",
            f"Reference: preferred rate {rate:.3f}.",
        ]
    return lines


def main() -> None:
    """Write the page."""
    files = sorted(FOLDER.glob("*.jsonl"))
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    print(keep(FOLDER, "tasks", page(rows)))


if __name__ == "__main__":
    main()
