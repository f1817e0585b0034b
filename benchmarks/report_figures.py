"""Figures over all experiments, a panel for each agent: radar, performance profile; and the matrix of who wins."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.report_rows import Bench, finite
from benchmarks.report_style import INK, look, sheet, style
from benchmarks.statistics import Estimate, improvement, profile
from prefenv.plotting import GREEN, GREY, RED

TAUS = np.linspace(0, 1, 51)


def radar(bench: Bench) -> Figure:
    """Score of every agent in every experiment: one radar each, after a first that names the axes."""
    names = list(bench.variants)
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    closed = np.r_[angles, angles[0]]
    with style():
        figure, axes = sheet(
            1 + len(bench.agents), 6, (1.5, 1.6), subplot_kw={"projection": "polar"}
        )
        for panel in axes:
            panel.set_theta_zero_location("N")
            panel.set_theta_direction(-1)
            panel.set(ylim=(0, 1), xticks=angles, yticks=(0.25, 0.5, 0.75, 1.0))
            panel.set(xticklabels=[], yticklabels=[])
            panel.spines["polar"].set_visible(False)
        key = axes[0]
        left, bottom, width, height = key.get_position().bounds
        key.set_position((left + 0.2 * width, bottom + 0.15 * height, 0.6 * width, 0.6 * height))
        for angle, name in zip(angles, names, strict=True):
            across, up = math.sin(angle), math.cos(angle)
            key.text(
                angle, 1.12, name, fontsize=7, ha=_side(across, "left", "right"),
                va=_side(up, "bottom", "top"),
            )  # fmt: skip
        for level in (0.5, 1.0):
            key.text(np.pi / len(names), level, f"{level:g}", fontsize=6, ha="center", va="center")
        for panel, agent in zip(axes[1:], bench.agents, strict=True):
            color = look(bench, agent)["color"]
            values = np.array([bench.scores[agent, n].value for n in names])
            shown = np.nan_to_num(values)
            panel.plot(closed, np.r_[shown, shown[0]], color=color, lw=1.4)
            panel.fill(angles, shown, color=color, alpha=0.25, lw=0)
            missing = [
                not finite(v) or bench.refused(agent, n) for v, n in zip(values, names, strict=True)
            ]
            panel.plot(
                angles[missing], np.full(sum(missing), 1.0), "x", color=GREY, ms=4, clip_on=False
            )
            mean = bench.overall[agent].value
            panel.set_title(f"{agent} {mean:.2f}" if finite(mean) else agent, fontsize=8)
    return figure


def _side(place: float, positive: str, negative: str) -> str:
    return "center" if abs(place) < 0.1 else positive if place > 0 else negative


def profiles(bench: Bench) -> Figure:
    """Share of runs above a score, with its 95 % band: the mean of all agents in grey."""
    found = {
        a: profile(bench.strata(a, *bench.variants), TAUS, bench.shares) for a in bench.complete
    }
    middle = np.mean([e.value for e in found.values()], 0)
    with style():
        figure, axes = sheet(
            len(found), 6, (1.5, 1.3), xlabel="score above", ylabel="share of runs", sharex=True, sharey=True,
        )  # fmt: skip
        for panel, agent in zip(axes, found, strict=True):
            panel.plot(TAUS, middle, color=GREY, lw=0.8)
            color = look(bench, agent)["color"]
            panel.fill_between(
                TAUS, found[agent].low, found[agent].high, color=color, alpha=0.3, lw=0
            )
            panel.plot(TAUS, found[agent].value, color=color, lw=1.5)
            panel.set(xlim=(0, 1), ylim=(0, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
            panel.set_xticklabels(("0", "0.5", "1"))
            panel.set_title(agent, fontsize=8)
    return figure


def improvements(bench: Bench) -> dict[tuple[str, str], Estimate]:
    """Probability that a run of the first agent beats one of the second, averaged over the experiments."""
    strata = {a: bench.strata(a, *bench.variants) for a in bench.complete}
    found = {}
    for i, x in enumerate(bench.complete):
        for y in bench.complete[i + 1 :]:
            p = improvement(strata[x], strata[y], bench.shares, resamples=500)
            found[x, y] = p
            found[y, x] = Estimate(1 - p.value, 1 - p.high, 1 - p.low)
    return found


def improvement_matrix(bench: Bench, found: dict[tuple[str, str], Estimate]) -> Figure:
    """The matrix of ``improvements``: green where the row's agent wins, red where it loses."""
    agents = bench.complete
    with style():
        size = 0.33 * len(agents) + 1.3
        figure = Figure(figsize=(size, size))
        axes = figure.add_axes((1.2 / size, 0.05 / size, 1 - 1.25 / size, 1 - 1.25 / size))
        for (x, y), p in found.items():
            row, column = agents.index(x), agents.index(y)
            color = GREEN if p.value > 0.5 else RED
            # The house's mid-tones under ink that is black or white: half covered they carry both.
            box = Rectangle(
                (column - 0.5, row - 0.5), 1, 1, color=color, lw=0, alpha=abs(p.value - 0.5)
            )
            axes.add_patch(box)
            sure = p.low > 0.5 or p.high < 0.5
            axes.text(
                column, row, f"{100 * p.value:.0f}", ha="center", va="center", fontsize=7,
                fontweight="bold" if sure else "normal", alpha=1.0 if sure else 0.6,
            )  # fmt: skip
        places = range(len(agents))
        axes.set_xticks(places, agents, rotation=90, fontsize=7)
        axes.set_yticks(places, agents, fontsize=7)
        axes.set(xlim=(-0.5, len(agents) - 0.5), ylim=(len(agents) - 0.5, -0.5), aspect="equal")
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("... a run of this agent, %", fontsize=8)
        axes.set_ylabel("a run of this agent beats ...", fontsize=8, color=INK)
        axes.xaxis.set_label_position("top")
    return figure
