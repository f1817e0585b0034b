"""Tune defaults: the same number of trials for every agent, on seeds that no result reports.

    python -m benchmarks.tune                 finished runs are not repeated; Ctrl-C loses only the run under way

A trial draws the agent's settings in ``SPACE`` log-uniformly, each within a factor of ``FACTOR`` of its default;
trial 0 is the default itself. A trial's worth is its mean score over the tuning seeds, of the trials whose shapes
stay whole (residual below twice the reference's on every seed) if there are any. Appends a line a run to
``results/tune.jsonl`` and writes ``results/tune.md``: what was tried, the best trial, and whether the default
stands. Defaults are changed by hand, and only where the best trial leads by more than ``LEAD``: two seeds cannot
tell smaller differences. The log keeps what the defaults were.
"""

from __future__ import annotations

import functools
import json
import random
import statistics
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

from benchmarks.engines import local
from prefenv.evaluation import Judge
from prefenv.registry import agent_config, make_agent
from prefenv.runs import RunConfig

RESULTS = Path(__file__).parent / "results"
SEEDS = (100, 101)
FACTOR = 4.0
LEAD = 0.02
SPACE: dict[str, tuple[str, ...]] = {
    "hil-dd": ("lr", "updates", "horizon"),
    "pfm": ("lr", "updates", "batch"),
    "d3po": ("lr", "beta", "anchor"),
    "ppo": ("lr", "clip_range", "anchor"),
    "grpo": ("lr", "clip_range", "anchor"),
    "dpok": ("lr", "kl_coef", "anchor"),
    "flow-dpo": ("lr", "beta", "anchor"),
    "dspo": ("lr", "beta", "updates"),
    "kto": ("lr", "beta", "anchor"),
    "mapo": ("lr", "beta", "updates"),
    "nft": ("lr", "beta", "kl_coef"),
    "awm": ("lr", "kl_coef", "minibatches"),
    "dgpo": ("lr", "beta", "anchor"),
    "rwr": ("lr", "tau", "updates"),
    "best-of-n": ("lr", "updates", "width"),
    "rft": ("lr", "updates", "batch"),
    "adjoint": ("lr", "minibatches", "epochs"),
    "draft": ("lr", "anchor", "minibatches"),
    "sb3-ppo": ("lr", "clip_range", "ent_coef"),
    "noise": ("lr", "gradient_steps", "width"),
    "learned-reward": ("lr", "updates", "anchors"),
}


@dataclass(frozen=True)
class Args:
    """Tune the agents' defaults.

    Args:
        agents: Which; default: all of ``SPACE``.
        trials: Of each agent, the default included.
        queries: Budget of each run in judged samples.
        workers: Processes; None = one per core.
        log: Where the runs are kept.
    """

    agents: tuple[str, ...] = tuple(SPACE)
    trials: int = 3
    queries: int = 4096
    workers: int | None = None
    log: Path = RESULTS / "tune.jsonl"


def draw(agent: str, trial: int) -> dict[str, float]:
    """The settings of a trial; none for trial 0."""
    if not trial:
        return {}
    rng, config = random.Random(f"{agent} {trial}"), agent_config(agent)
    found = {}
    for name in SPACE[agent]:
        default = getattr(config, name)
        value = default * FACTOR ** rng.uniform(-1, 1)
        found[name] = max(1, round(value)) if isinstance(default, int) else float(f"{value:.3g}")
    return found


@dataclass(frozen=True)
class Trial:
    """One run: an agent's settings, a seed and a budget."""

    agent: str
    trial: int
    seed: int
    queries: int

    def head(self) -> dict[str, Any]:
        """What its line begins with, and is known by."""
        return {"task": list(astuple(self))}


@functools.cache
def judge() -> Judge:
    """What scores them, made once a process."""
    return RunConfig().judge()


def work(task: Trial) -> dict[str, Any]:
    """Do a run; its line of the log."""
    torch.set_num_threads(1)
    try:
        return {**task.head(), **run(task)}
    except Exception as error:  # one crash is a result, and not the end of the others
        return {**task.head(), "error": f"{type(error).__name__}: {error}"}


def run(task: Trial) -> dict[str, Any]:
    """Learn with a trial's settings, and measure."""
    agent, seed, queries = task.agent, task.seed, task.queries
    settings, config = draw(agent, task.trial), agent_config(agent)
    text = f"{agent}:{','.join(f'{k}={v}' for k, v in settings.items())}" if settings else agent
    model = make_agent(
        text, RunConfig(agent=text, queries=queries, seed=seed).make_env(), seed=seed
    )
    model.learn(queries)
    result = judge().evaluate(model, kl=False)
    return {
        "settings": settings,
        "defaults": {k: getattr(config, k) for k in SPACE[agent]},
        "preferred_rate": result.preferred_rate,
        "score": result.score,
        "residual_ratio": result.residual / result.reference_residual,
        "seconds": model.env.ledger.seconds,
    }


def gather(tasks: list[Trial], log: Path, workers: int | None) -> list[dict[str, Any]]:
    """All lines of the log, after the runs that it did not hold; each is kept as it comes."""
    lines = log.read_text().splitlines() if log.exists() else []
    rows = [json.loads(line) for line in lines]
    done = [row["task"] for row in rows]
    todo = [task for task in tasks if task.head()["task"] not in done]
    if not todo:
        return rows
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out, tqdm(total=len(todo), unit="run") as bar:
        for _, row in local(work, todo, workers):
            if row is not None:
                rows.append(row)
                out.write(json.dumps(row) + "\n")
                out.flush()
                bar.update()
    return rows


def best(rows: list[dict[str, Any]]) -> dict[int, tuple[float, bool]]:
    """Of each trial that ran without an error: its mean score, and whether its shapes stayed whole."""
    trials: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        trials.setdefault(row["task"][1], []).append(row)
    return {
        trial: (
            statistics.mean(r["score"] for r in runs),
            all(r["residual_ratio"] < 2 for r in runs),
        )
        for trial, runs in sorted(trials.items())
        if not any("error" in r for r in runs)
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown line per agent."""
    lines = [
        "| agent | varied | trials | default: score | best: score | best: settings | verdict |",
        "|---" * 7 + "|",
    ]
    for agent in SPACE:
        mine = [r for r in rows if r["task"][0] == agent]
        found = best(mine)
        if 0 not in found:
            continue
        whole = {t: s for t, (s, fine) in found.items() if fine} or {
            t: s for t, (s, _) in found.items()
        }
        top = max(whole, key=whole.__getitem__)
        lead = whole[top] - found[0][0]
        stands = top == 0 or (lead <= LEAD and 0 in whole)
        settings = next(r["settings"] for r in mine if r["task"][1] == top)
        named = ", ".join(f"{k} {v}" for k, v in settings.items()) or "the default"
        lines.append(
            f"| `{agent}` | {', '.join(SPACE[agent])} | {len(found)} | {found[0][0]:.3f} | {whole[top]:.3f} "
            f"| {named} | {'default stands' if stands else 'taken'} |"
        )
    return lines


def main(args: Args) -> None:
    """Run what is missing, and write the table."""
    wanted = [
        Trial(agent, trial, seed, args.queries)
        for agent in args.agents
        for trial in range(args.trials)
        for seed in SEEDS
    ]
    rows = gather(wanted, args.log, args.workers)
    text = [
        "# How the defaults were tuned",
        "",
        f"`python -m benchmarks.tune`: {args.trials} trials for each agent on seeds {SEEDS[0]} and {SEEDS[1]}, "
        f"{args.queries} judged samples, panels of 4. Scores are means over the seeds.",
        "",
        *table(rows),
        "",
    ]
    args.log.with_suffix(".md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
