"""The rows of finished runs as the report needs them: by experiment, variant, agent and seed.

A run's score is clipped to [0, 1]. A refusal counts 0, as the untouched reference would, and so does an error;
both are listed. An experiment's score is the mean over its variants of the IQM over seeds; the score over all
experiments is the IQM over all runs, the experiments weighted alike. Agents that lack runs get none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.statistics import LEAST, Estimate, iqm, mean_iqm, pooled_iqm
from prefenv.errors import RunError

Row = dict[str, Any]
NOTHING = Estimate(math.nan, math.nan, math.nan)
# Nats that a KL may be off by its integrator's steps: references are 0.01 to 0.08 from themselves.
STEPS = 0.1
# Few steps make other samples than the flow whose likelihood is known: no KL belongs to their reward.
OTHER_LAW = ("coarse",)


@dataclass(frozen=True)
class Described:
    """What the report wants to know of an experiment: what it asks, and its variants' labels in order."""

    question: str
    variants: tuple[str, ...]


def read(folder: Path, task: str | None = None) -> list[Row]:
    """The rows of ``folder/*.jsonl`` on one task; of two rows of one run the later counts.

    Args:
        folder: Where they are.
        task: Rows of ``EXPERIMENT@TASK``; None = those of the experiments as they stand. They never mix.

    Raises:
        RunError: There is no row, or a line is none.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                row = json.loads(line)
                rows[row["experiment"], row["variant"], row["agent"], row["seed"]] = row
            except (ValueError, KeyError, TypeError):
                raise RunError(f"{path}, line {number}: this is not the row of a run") from None
    found = [r for r in rows.values() if r["experiment"].partition("@")[2] == (task or "")]
    if not found:
        others = sorted({r["experiment"].partition("@")[2] for r in rows.values()} - {""})
        told = f" (there are some of --task {', '.join(others)})" if others else ""
        option = f" --task {task}" if task else ""
        raise RunError(f"{folder}: no results in there{told}; prefenv bench{option} makes some")
    return found


def finite(value: float | None) -> bool:
    """Whether there is a number."""
    return value is not None and math.isfinite(value)


def finished(row: Row) -> bool:
    """Whether a run came to a score."""
    return "refused" not in row and "error" not in row and finite(row.get("score"))


def run_score(row: Row) -> float:
    """What a run counts, in [0, 1]."""
    return min(max(row["score"], 0.0), 1.0) if finished(row) else 0.0


def in_order(variants: Iterable[str]) -> list[str]:
    """Labels by their number, where all are numbers; else as they come."""
    labels = list(variants)
    try:
        return sorted(labels, key=float)
    except ValueError:
        return labels


def trouble(row: Row) -> str:
    """Why a run has no score."""
    return row.get("refused") or row.get("error") or f"the score is {row.get('score')}"


@dataclass(frozen=True)
class Bench:
    """All rows, and what follows from them.

    Args:
        rows: One per run.
        variants: Of each experiment that has rows, in order: its variants that have rows.
        questions: What each experiment asks.
    """

    rows: tuple[Row, ...]
    variants: Mapping[str, tuple[str, ...]]
    questions: Mapping[str, str]

    @cached_property
    def by_stratum(self) -> dict[tuple[str, str, str], list[Row]]:
        """Rows by experiment, variant and agent, in the order of their seeds."""
        found: dict[tuple[str, str, str], list[Row]] = {}
        for row in sorted(self.rows, key=lambda r: r["seed"]):
            found.setdefault((row["experiment"], row["variant"], row["agent"]), []).append(row)
        return found

    def runs(self, agent: str, experiment: str, variant: str | None = None) -> list[Row]:
        """Finished runs of an agent in an experiment, or in one variant of it."""
        wanted = self.variants[experiment] if variant is None else (variant,)
        rows = [r for v in wanted for r in self.by_stratum.get((experiment, v, agent), [])]
        return [r for r in rows if finished(r)]

    def refused(self, agent: str, experiment: str) -> bool:
        """Whether the agent refuses every variant."""
        rows = [
            r
            for v in self.variants[experiment]
            for r in self.by_stratum.get((experiment, v, agent), [])
        ]
        return bool(rows) and all("refused" in r for r in rows)

    def strata(self, agent: str, *experiments: str) -> list[np.ndarray]:
        """Scores of an agent in every variant of the experiments; an empty list where one has no run."""
        keys = [(e, v, agent) for e in experiments for v in self.variants[e]]
        if not all(k in self.by_stratum for k in keys):
            return []
        found = []
        for key in keys:
            scores = np.array([run_score(r) for r in self.by_stratum[key]])
            # A refusal is the same with every seed, so one row of it stands for all.
            always = all("refused" in r for r in self.by_stratum[key])
            found.append(np.zeros(max(LEAST, len(scores))) if always else scores)
        return found

    @cached_property
    def shares(self) -> list[float]:
        """Weight of every stratum: experiments alike, and the variants of one alike."""
        return [1 / len(v) for v in self.variants.values() for _ in v]

    @cached_property
    def overall(self) -> dict[str, Estimate]:
        """Score over all experiments of each agent, best first; those that lack runs last, with NaN."""
        found = {}
        for agent in sorted({r["agent"] for r in self.rows}):
            strata = self.strata(agent, *self.variants)
            found[agent] = pooled_iqm(strata, self.shares) if strata else NOTHING
        return dict(sorted(found.items(), key=lambda x: (math.isnan(x[1].value), -x[1].value)))

    @cached_property
    def agents(self) -> tuple[str, ...]:
        """All agents, the best first."""
        return tuple(self.overall)

    @cached_property
    def complete(self) -> tuple[str, ...]:
        """Agents with runs in every variant of every experiment, the best first."""
        return tuple(a for a, e in self.overall.items() if finite(e.value))

    @cached_property
    def scores(self) -> dict[tuple[str, str], Estimate]:
        """Score of each agent in each experiment."""
        found = {}
        for agent in self.agents:
            for name in self.variants:
                strata = self.strata(agent, name)
                found[agent, name] = mean_iqm(strata) if strata else NOTHING
        return found

    @cached_property
    def without_score(self) -> list[Row]:
        """Runs that failed or were refused."""
        return [r for r in self.rows if not finished(r)]

    @cached_property
    def above_frontier(self) -> list[Row]:
        """Runs above the frontier by more than their KL's error (1.96 standard errors and ``STEPS``): none."""
        told = [r for r in self.rows if r["experiment"] not in OTHER_LAW]
        rows = [r for r in told if finished(r) and finite(r["kl_nats"])]
        most = [r["kl_nats"] + 1.96 * r["kl_stderr"] + STEPS for r in rows]
        return [r for r, kl in zip(rows, most, strict=True) if kl < r["frontier_kl_nats"]]


def bench(rows: list[Row], experiments: Mapping[str, Described]) -> Bench:
    """Put rows in the order of ``experiments``; names and variants that it does not know come last."""
    variants: dict[str, tuple[str, ...]] = {}
    for name in [*experiments, *sorted({r["experiment"] for r in rows} - experiments.keys())]:
        has = {r["variant"] for r in rows if r["experiment"] == name}
        known = experiments[name].variants if name in experiments else ()
        order = [v for v in known if v in has] + sorted(has - set(known))
        if order:
            variants[name] = tuple(order)
    questions = {n: experiments[n].question if n in experiments else "" for n in variants}
    return Bench(tuple(rows), variants, questions)


def learning(
    bench: Bench, agent: str, experiment: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Learning curve over the runs with the experiment's largest budget: ``(points,)`` each.

    Between the points of a run, seconds and score are interpolated; it starts at the reference, which costs
    nothing and scores 0.

    Returns:
        Queries, median CPU seconds, IQM of the score.
    """
    runs = [r for a in bench.agents for r in bench.runs(a, experiment)]
    budget = max((r["budget"] for r in runs), default=0)
    rows = [r for r in bench.runs(agent, experiment) if r["budget"] == budget and r.get("curve")]
    curves = [np.array([[0.0, 0.0, 0.0], *(p[:3] for p in r["curve"])]) for r in rows]
    if not curves:
        return np.empty(0), np.empty(0), np.empty(0)
    queries = np.unique(np.concatenate([c[:, 0] for c in curves]))
    seconds = [np.interp(queries, c[:, 0], c[:, 1]) for c in curves]
    scores = [np.interp(queries, c[:, 0], c[:, 2].clip(0, 1)) for c in curves]
    return queries, np.median(seconds, 0), iqm(np.stack(scores, -1))
