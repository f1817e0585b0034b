"""The report's sections: which words, figures and tables come after one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import report_curves as curves
from benchmarks import report_figures as figures
from benchmarks import report_tables as tables
from benchmarks.report_html import Figure, Section
from benchmarks.report_rows import OTHER_LAW, STEPS, Bench
from benchmarks.report_style import style, svg


def figure(name: str, alt: str, drawn: Any) -> Figure | None:
    """A drawn figure for the report; None stays None."""
    if drawn is None:
        return None
    with style():
        return Figure(name, alt, svg(drawn, name, alt))


def best(bench: Bench, count: int = 3) -> str:
    """The first agents in words, ``"ppo 0.93, nft 0.91"``."""
    return ", ".join(f"{a} {bench.overall[a].value:.2f}" for a in bench.complete[:count])


def overview(bench: Bench) -> list[Section]:
    """What is asked, and what came out over all experiments."""
    found = [
        Section(
            "Experiments",
            "A score is `1 - D(B, p*) / D(A, p*)`: 0 = the untouched reference, 1 = the exact optimum at `beta`, "
            "clipped to [0, 1]. A refusal and a failure count 0. Budgets are samples judged by the oracle.",
            table=tables.experiment_table(bench),
        )
    ]
    if len(bench.variants) > 2:  # a radar needs three axes
        alt = (
            f"Radar charts of {len(bench.agents)} agents over {len(bench.variants)} experiments. "
            f"Best over all: {best(bench)}."
        )
        text = (
            "One radar an agent, the best first; an axis an experiment, the rim a score of 1. Beside the name "
            "stands the score over all experiments. A cross: the agent refuses the experiment, or has not run it."
        )
        found.append(Section("Radar", text, figure("radar", alt, figures.radar(bench))))
    text = (
        "IQM over seeds with 95 % intervals (stratified bootstrap; from five seeds on, where they hold the truth "
        "91 times of 100), the mean over an experiment's variants; **all** is the IQM over all runs, experiments "
        "weighted alike; it leaves out the best and the worst quarter, so that a few refusals cost little. Bold: "
        "the best, where its interval lies above all others'. † a run failed. All runs are measured with the same "
        "noises and the same samples of the optimum, whose own error is in no interval: other samples of `p*` "
        "itself score 0.91 to 1 in `modes`, and a model that learned nothing scores -0.02 to 0.04. *Optimum*: one "
        "such further set of samples."
    )
    found.append(Section("Scores", text, table=tables.score_table(bench)))
    table = tables.quality_table(bench)
    found.append(Section("Quality and cost", "Medians over all finished runs.", table=table))
    if len(bench.complete) > 1:
        found.append(_improvement(bench))
    if bench.complete:
        alt = f"Share of runs above each score, a panel an agent. Best over all: {best(bench)}."
        text = "Share of runs above a score, with its 95 % band; grey: the mean of all agents."
        drawn = figure("profiles", alt, figures.profiles(bench))
        found.append(Section("Performance profiles", text, drawn))
    return found


def _improvement(bench: Bench) -> Section:
    wins, number = figures.improvements(bench), len(bench.complete)
    first, second = bench.complete[:2]
    p = wins[first, second]
    alt = (
        f"Matrix of {number} by {number} agents. A run of {first} beats one of {second} with probability "
        f"{tables.interval(p)}."
    )
    text = (
        "How often a run of the row's agent beats one of the column's in the same experiment, in percent, ties "
        "half, averaged over the experiments. Bold where the 95 % interval (from five seeds on) leaves 50 % out."
    )
    drawn = figure("improvement", alt, figures.improvement_matrix(bench, wins))
    return Section("Probability of improvement", text, drawn)


def details(bench: Bench, frontiers: Mapping[str, Any]) -> list[Section]:
    """What single experiments show."""
    text = "IQM over the finished runs with an experiment's largest budget, its variants together."
    found = []
    for cost, label in (("queries", "oracle queries"), ("seconds", "CPU seconds")):
        alt = f"Score of every agent against {label}, a panel an experiment."
        drawn = figure(f"score-{cost}", alt, curves.score_against(bench, cost))
        found.append(Section(f"Score against {label}", text, drawn))
    alt = "Mean true reward of every agent against its KL to the reference, with the frontier."
    text = (
        "Medians over the runs of the first variant, with 1.96 standard errors of the KL. Nothing can lie in the "
        "shaded region beyond the frontier, but for its own error, the band. Hollow: the agent has no likelihood, "
        "and its KL is at most this. "
        "Dotted: the reference's reward. Runs above the frontier by more than their KL's error (1.96 standard "
        f"errors, and {STEPS} nats for the integrator's steps): "
        f"{len(bench.above_frontier)}. The frontier ends where fewer than 100 effective samples carry it; "
        f"{' and '.join(f'`{n}`' for n in OTHER_LAW)} has none, as its samples of few steps are not the flow's."
    )
    drawn = figure("reward-kl", alt, curves.reward_against_kl(bench, frontiers))
    table = tables.frontier_table(bench)
    found.append(Section("Reward against KL", text, drawn, table, folded=True))
    for name in bench.variants:
        alt = f"True score of every run of {name} against its proxy reward, a panel an agent."
        drawn = figure(f"over-optimisation-{name}", alt, curves.over_optimisation(bench, name))
        text = (
            f"`{name}`: the proxy's mean reward, which the agent sees, and the true score, while it learns; a "
            "line a run, a dot its end. A line that turns down is over-optimised."
        )
        if drawn:
            found.append(Section(f"Over-optimisation: {name}", text, drawn))
    alt = "Score of every agent in each variant, a panel an experiment."
    drawn = figure("variants", alt, curves.score_by_variant(bench))
    if drawn:
        found.append(Section("Score against variant", "IQM over seeds.", drawn))
    return found


def appendix(bench: Bench) -> list[Section]:
    """What is missing, and how every number is remade."""
    missing = tables.missing_table(bench)
    text = f"Runs without a score: {len(bench.without_score)} of {len(bench.rows)}."
    found = [Section("Failures and refusals", text, table=tables.trouble_table(bench))]
    if missing.rows:
        found.append(Section("Not finished", "No score over all experiments.", table=missing))
    text = "The command remakes the run; places are listed below."
    more = f"{text} Every single run is in `report.html` and in the rows."
    strata = tables.run_table(bench, every_seed=False)
    runs = tables.run_table(bench, every_seed=True)
    return [
        *found,
        Section("Runs", more, table=strata, folded=True, only="md"),
        Section("Runs", text, table=runs, folded=True, only="html"),
        Section("Places", "Machines and versions.", table=tables.place_table(bench)),
    ]
