"""Figures of single experiments: what a score costs, what it moves, and what a knob does to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.report_rows import OTHER_LAW, Bench, finite, in_order, learning, run_score
from benchmarks.report_style import INK, handles, look, sample, sheet, style
from benchmarks.statistics import iqm
from prefenv.plotting import BLUE, GREY

LEAST_KL = 1e-2  # what a logarithmic axis shows of smaller or negative estimates


def score_against(bench: Bench, cost: str) -> Figure:
    """Score of every agent while it learns, against ``queries`` or ``seconds``, a panel an experiment."""
    with style():
        label = {"queries": "samples judged by the oracle", "seconds": "CPU seconds"}[cost]
        figure, axes = sheet(
            len(bench.variants), 4, (2.2, 1.7), xlabel=label, ylabel="score", handles=handles(bench),
            sharey=True,
        )  # fmt: skip
        for panel, name in zip(axes, bench.variants, strict=True):
            for agent in reversed(bench.agents):  # the best on top
                queries, seconds, score = learning(bench, agent, name)
                x = queries if cost == "queries" else seconds
                panel.plot(x[1:], score[1:], ms=2, lw=1, **look(bench, agent))
            panel.set(ylim=(-0.02, 1.02))
            _logarithmic(panel, 1, 3)
            panel.set_title(name)
    return figure


def reward_against_kl(bench: Bench, frontiers: Mapping[str, Any]) -> Figure:
    """Mean reward against KL to the reference: medians over runs; hollow where only a bound is known.

    Of an experiment's variants it is the first, whose frontier the runner keeps.

    Args:
        bench: The rows.
        frontiers: By experiment: ``reward`` and ``kl`` of the frontier's points, and the numbers
            ``optimum_reward``, ``optimum_kl`` and ``reference_reward``.
    """
    marks = {
        "frontier": sample(color=BLUE, linewidth=2),
        "optimum": sample(color=BLUE, linestyle="none", marker="*", markersize=8),
        "at most": sample(color=INK, linestyle="none", marker="<", markerfacecolor="none"),
    }
    with style():
        shown = [name for name in bench.variants if name not in OTHER_LAW]
        figure, axes = sheet(
            len(shown), 4, (2.2, 1.7), xlabel="KL(B || A) in nats", ylabel="mean true reward",
            handles={**marks, **handles(bench)},
        )  # fmt: skip
        for panel, name in zip(axes, shown, strict=True):
            curve = frontiers.get(name, {})
            variant, *others = bench.variants[name]
            if curve:
                tops = [r["reward"] for a in bench.agents for r in bench.runs(a, name, variant)]
                _frontier(panel, curve, max(tops, default=0.0))
            for agent in reversed(bench.agents):
                _point(panel, bench.runs(agent, name, variant), look(bench, agent))
            _logarithmic(panel, 1)
            panel.set_title(f"{name}, {variant}" if others else name)
    return figure


def _logarithmic(panel: Any, *ticks: int) -> None:
    """Powers of ten times ``ticks``, where there is something to show."""
    if any(len(line.get_xdata()) for line in panel.lines):
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=ticks))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("")


def _frontier(panel: Any, curve: Mapping[str, Any], top: float) -> None:
    """The frontier and what lies beyond it, up to ``top``; the reference's reward and the optimum."""
    reward, kl = np.asarray(curve["reward"], float), np.asarray(curve["kl"], float)
    seen = np.isfinite(kl) & (kl >= LEAST_KL)
    top = max(top, reward[seen].max(initial=top))
    top += 0.05 * (top - curve["reference_reward"])
    panel.axhline(curve["reference_reward"], color=GREY, lw=1, ls=":")
    error = 1.96 * np.asarray(curve.get("reward_stderr", 0 * reward), float)[seen]
    panel.fill_between(
        kl[seen], reward[seen] - error, reward[seen] + error, color=BLUE, alpha=0.3, lw=0
    )
    panel.plot(kl[seen], reward[seen], color=BLUE, lw=1.5)
    panel.fill_between(kl[seen], reward[seen], top, color=BLUE, alpha=0.08, lw=0)
    panel.plot(curve["optimum_kl"], curve["optimum_reward"], "*", color=BLUE, ms=8)


def _point(panel: Any, rows: list[dict[str, Any]], style: dict[str, Any]) -> None:
    """An agent's median KL and reward with 1.96 standard errors; its bound, hollow, where there is no KL."""
    for key, face in (("kl_nats", style["color"]), ("kl_bound_nats", "none")):
        known = [r for r in rows if finite(r[key])]
        if known:
            kl = max(float(np.median([r[key] for r in known])), LEAST_KL)
            reward = float(np.median([r["reward"] for r in known]))
            error = 1.96 * float(np.median([r["kl_stderr"] or 0.0 for r in known]))
            ends = [[min(error, kl - LEAST_KL)], [error]]
            marker = style["marker"] if key == "kl_nats" else "<"
            panel.errorbar(
                kl, reward, xerr=None if face == "none" else ends, fmt=marker, ms=4, lw=0.8,
                color=style["color"], markerfacecolor=face,
            )  # fmt: skip
            return


def score_by_variant(bench: Bench) -> Figure | None:
    """IQM of the score in each variant; None where no experiment has more than one."""
    turned = {n: in_order(v) for n, v in bench.variants.items() if len(v) > 1}
    if not turned:
        return None
    with style():
        figure, axes = sheet(
            len(turned), 3, (2.9, 1.9), ylabel="score", handles=handles(bench), sharey=True
        )
        for panel, (name, variants) in zip(axes, turned.items(), strict=True):
            for agent in reversed(bench.agents):
                strata = {v: bench.by_stratum.get((name, v, agent), []) for v in variants}
                y = [
                    iqm(np.array([run_score(r) for r in s])) if s else np.nan
                    for s in strata.values()
                ]
                if not bench.refused(agent, name):
                    panel.plot(range(len(variants)), y, ms=3, lw=1, **look(bench, agent))
            panel.set_xticks(range(len(variants)), variants)
            panel.set(ylim=(-0.02, 1.02))
            panel.set_title(name)
    return figure


def proxy_curves(bench: Bench, agent: str, experiment: str) -> list[np.ndarray]:
    """Proxy reward and true score of every run while it learns, ``(points, 2)`` each."""
    curves = [
        np.array([(p[4], p[2]) for p in r["curve"] if finite(p[4])])
        for r in bench.runs(agent, experiment)
    ]
    return [c for c in curves if len(c)]


def over_optimisation(bench: Bench, experiment: str) -> Figure | None:
    """True score against what the proxy says, up to the last look, a dot; None without a proxy."""
    curves = {a: proxy_curves(bench, a, experiment) for a in bench.agents}
    curves = {a: c for a, c in curves.items() if c}
    if not curves:
        return None
    with style():
        figure, axes = sheet(
            len(curves), 6, (1.5, 1.3), xlabel="proxy reward", ylabel="true score", sharex=True, sharey=True,
        )  # fmt: skip
        for panel, agent in zip(axes, curves, strict=True):
            color = look(bench, agent)["color"]
            for curve in curves[agent]:
                panel.plot(*curve.T, color=color, lw=1.2)
                panel.plot(*curve[-1], "o", color=color, ms=3)
            panel.set_title(agent, fontsize=8)
        lowest = min(c[:, 1].min() for many in curves.values() for c in many)
        axes[0].set_ylim(max(min(lowest, 0) - 0.05, -0.5), 1.05)
    return figure
