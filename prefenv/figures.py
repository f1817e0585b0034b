"""Figures of runs: what models make of the same noises, and what they earn at what distance from the reference."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from prefenv import plotting
from prefenv.evaluation import Judge, made
from prefenv.policy import FlowPolicy
from prefenv.tasks import Classes


def shapes_figure(judge: Judge, models: dict[str, Any], n: int = 12) -> Figure:
    """The reference's samples (red) and each model's from the same noises (green), one of each class asked for."""
    task = judge.task
    kinds = task.classes if isinstance(task.condition, Classes) else ()
    noise, asked = judge.shown(len(judge.noise) if task.overlay else len(kinds) or n)
    reference = FlowPolicy(judge.reference, steps=judge.steps, shift=judge.task.shift)
    rows = [made(m, noise, asked).cpu().numpy() for m in (reference, *models.values())]
    colors = [plotting.RED, *[plotting.GREEN] * len(models)]
    names = ["reference", *models]
    if task.overlay:
        return plotting.overlays(task, rows, colors, names)
    return plotting.sheet(task, rows, colors, names, heads=kinds)


def frontier_figure(summaries: list[dict[str, Any]], judge: Judge) -> Figure:
    """Mean reward against KL to the reference, with the frontier that no agent can pass."""
    with plotting.style():
        figure = Figure(figsize=(6, 3.8), layout="constrained")
        axes = figure.add_subplot()
        reward, kl, _ = judge.frontier_curve()
        seen = kl > 1e-3
        axes.plot(kl[seen], reward[seen], color=plotting.BLUE, label="frontier (exact)")
        axes.fill_between(kl[seen], reward[seen], 1.05, color=plotting.BLUE, alpha=0.07, lw=0)
        axes.axhline(
            float(judge.rewards.mean()), color=plotting.RED, lw=1, ls=":", label="reference"
        )
        axes.scatter(
            judge.optimum_kl, judge.optimum_reward, marker="*", s=130, color=plotting.BLUE, zorder=3,
            label=f"optimum, beta {judge.beta}",
        )  # fmt: skip
        for entry in summaries:
            if entry["kl_nats"] is None:
                continue
            x, error = entry["kl_nats"], 2 * entry["kl_stderr"]
            axes.errorbar(x, entry["reward"], xerr=error, fmt="o", color=plotting.GREEN, ms=5)
            axes.annotate(
                entry["agent"], (x, entry["reward"]), textcoords="offset points", xytext=(6, 5),
                color=plotting.GREEN,
            )  # fmt: skip
        axes.set(
            xscale="log", ylim=(0, 1.05), xlabel="KL(B || A) in nats", ylabel="mean reward",
            title="Reward against distance from the reference",
        )  # fmt: skip
        axes.legend(loc="center right")
    return figure
