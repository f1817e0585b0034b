"""The table of ``agents/README.md``: what each agent needs, and what it reached in ``basic``.

``make report`` makes it of the committed rows, ``benchmarks/results/bench/basic.jsonl``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.pages import spread
from benchmarks.report_rows import finished
from prefenv.registry import lookup

LEVEL = 0.8  # the score whose price in answers is told
# Feedback it learns from, what it does with the reference, and whether it learns from its own newest samples.
TRAITS: dict[str, tuple[str, str, str]] = {
    "best-of-n": ("scores", "samples it", "offline"),
    "rft": ("scores", "starts from it", "offline"),
    "hil-dd": ("choices", "its data barrier", "online"),
    "pfm": ("pairs", "flows on from it", "offline"),
    "d3po": ("pairs", "in the loss", "online"),
    "ppo": ("scores", "anchor", "online"),
    "grpo": ("scores", "KL, anchor", "online"),
    "dpok": ("scores", "KL, anchor", "online"),
    "flow-dpo": ("pairs", "in the loss", "offline"),
    "dspo": ("pairs", "in the loss", "offline"),
    "kto": ("scores", "in the loss", "offline"),
    "mapo": ("pairs", "starts from it", "offline"),
    "nft": ("scores", "KL", "online"),
    "awm": ("scores", "KL", "online"),
    "dgpo": ("scores", "in the loss, anchor", "online"),
    "rwr": ("scores", "samples it", "offline"),
    "adjoint": ("reward gradients", "in the loss", "online"),
    "draft": ("reward gradients", "anchor", "online"),
    "noise": ("scores", "its frozen decoder", "online"),
    "sb3-ppo": ("scores", "anchor", "online"),
    "learned-reward": ("scores", "samples it", "own questions"),
}
HEAD = (
    "agent", "feedback", "log-prob", "gradient", "reference", "samples", "preferred rate", "score",
    "residual / reference's", "diversity", f"queries to {LEVEL}", "CPU seconds",
)  # fmt: skip


def soon(row: dict[str, Any]) -> float:
    """Judged samples at the first look at which the score was ``LEVEL``."""
    return next((point[0] for point in row["curve"] if point[2] >= LEVEL), math.inf)


def line(rows: Iterable[dict[str, Any]], agent: str) -> str:
    """An agent's line of the table."""
    requires = lookup("agent", agent).requires
    feedback, reference, online = TRAITS[agent]
    needs = ["yes" if needed else "" for needed in (requires.log_prob, requires.gradient)]
    cells = [f"`{agent}`", feedback, *needs, reference, online]
    fine = [r for r in rows if r["agent"] == agent and finished(r)]
    if not fine:
        return f"| {' | '.join(cells)} |" + " no run |" * 6
    middle = statistics.median(soon(r) for r in fine)
    numbers = [
        spread([r["preferred_rate"] for r in fine]),
        spread([r["score"] for r in fine]),
        f"{statistics.median(r['residual'] / r['reference_residual'] for r in fine):.2f}",
        f"{statistics.median(r['diversity'] or 0.0 for r in fine):.2f}",
        f"{middle:,.0f}" if middle < math.inf else "never",
        f"{statistics.median(r['cpu_seconds'] for r in fine):.1f}",
    ]
    return f"| {' | '.join(cells + numbers)} |"


def table(rows: list[dict[str, Any]]) -> tuple[list[str], str]:
    """The table's lines, and the note below.

    Args:
        rows: Of ``basic``, one at least that is finished.
    """
    first = next(filter(finished, rows))
    seeds = len({r["seed"] for r in rows})
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|", *(line(rows, a) for a in TRAITS)]
    looks = ", ".join(f"{point[0]:,}" for point in first["curve"][:-1])
    note = (
        f"Median (range) over {seeds} seeds of `basic`: {first['budget']:,} judged samples in panels of 4, all "
        f"with the same network, sampler and evaluation. *Queries to {LEVEL}*: judged samples after which the "
        f"score was {LEVEL}, looked at after {looks} and at the end (*never*: in fewer than half of the seeds). "
        "Made by `make report`."
    )
    return lines, note
