"""All agents at one budget: what each needs, what it reaches, and how soon.

    python -m benchmarks.all_agents           finished runs are not repeated; Ctrl-C loses only those under way

Runs every agent of ``TRAITS`` with its defaults over seeds 0 to 4 at 4,096 judged samples in panels of 4, and
looks at 256 samples of model B after every round until 95 % are preferred. Appends a line a run to
``results/all_agents.jsonl``, writes ``results/all_agents.md``, and the table to ``agents/README.md``, between its
``results`` marks.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.pages import keep, spread, update_readme
from benchmarks.pool import gather
from prefenv.evaluation import Judge
from prefenv.registry import lookup, make_agent
from prefenv.runs import RunConfig

RESULTS = Path(__file__).parent / "results"
LEVEL = 0.95
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


@dataclass(frozen=True)
class Args:
    """Run all agents over seeds.

    Args:
        agents: Which; default: all of them.
        seeds: How many seeds, from 0.
        queries: Budget of each run in judged samples.
        workers: Processes; None = one per core.
        out: Folder of the results.
    """

    agents: tuple[str, ...] = tuple(TRAITS)
    seeds: int = 5
    queries: int = 4096
    workers: int | None = None
    out: Path = RESULTS


def run(judge: Judge, agent: str, seed: int, queries: int) -> dict[str, Any]:
    """One run, its evaluation, and the preferred rate after every round."""
    config = RunConfig(agent=agent, queries=queries, seed=seed)
    model = make_agent(agent, config.make_env(), seed=seed)
    curve: list[tuple[int, float]] = []
    looked, began = 0.0, time.process_time()

    def look(model: Any, _: Any) -> None:
        nonlocal looked
        if curve and curve[-1][1] >= LEVEL:
            return
        start = time.process_time()
        scores = judge.oracle.score(model.sample(judge.noise[:256]).cpu())
        rate = float((scores >= judge.oracle.threshold).float().mean())
        curve.append((model.env.ledger.queries, rate))
        looked += time.process_time() - start

    model.learn(queries, callback=look)
    cpu_seconds = time.process_time() - began - looked
    result = dataclasses.asdict(judge.evaluate(model, kl=False))
    return {
        "config": config.record(),
        **model.env.ledger.counts(),
        "cpu_seconds": cpu_seconds,
        **{k: None if v != v else v for k, v in result.items()},
        "curve": curve,
    }


def summary(rows: list[dict[str, Any]], agent: str) -> str:
    """An agent's line of the table."""
    cls = lookup("agent", agent)
    feedback, reference, online = TRAITS[agent]
    cells = [
        feedback,
        "yes" if cls.requires.log_prob else "",
        "yes" if cls.requires.gradient else "",
        reference,
        online,
    ]
    fine = [r for r in rows if r["task"][0] == agent and "error" not in r]
    if not fine:
        return f"| `{agent}` | {' | '.join(cells)} |" + " no run |" * 6
    soon = [next((q for q, rate in r["curve"] if rate >= LEVEL), math.inf) for r in fine]
    middle = statistics.median(soon)
    numbers = [
        spread([r["preferred_rate"] for r in fine]),
        spread([r["score"] for r in fine]),
        f"{statistics.median(r['residual'] / r['reference_residual'] for r in fine):.2f}",
        f"{statistics.median(r['diversity'] or 0.0 for r in fine):.2f}",
        f"{middle:.0f}" if middle < math.inf else "never",
        f"{statistics.median(r['cpu_seconds'] for r in fine):.1f}",
    ]
    return f"| `{agent}` | {' | '.join(cells + numbers)} |"


def main(args: Args) -> None:
    """Run what is missing, and write the table."""
    wanted = [(a, s, args.queries) for a in args.agents for s in range(args.seeds)]
    rows = gather(run, wanted, args.out / "all_agents.jsonl", args.workers)
    rows = [r for r in rows if tuple(r["task"]) in wanted]
    table = [
        "| agent | feedback | log-prob | gradient | reference | samples | preferred rate | score "
        f"| residual / reference's | diversity | queries to {LEVEL} | CPU seconds |",
        "|---" * 12 + "|",
        *(summary(rows, agent) for agent in args.agents),
    ]
    note = (
        f"Median (range) over {args.seeds} seeds at {args.queries:,} judged samples in panels of 4, all with the "
        "same network, sampler and evaluation. *Queries to 0.95*: judged samples after which 95 % of model B's "
        "are preferred, in rounds of 128 (*never*: in fewer than half of the seeds). CPU "
        "seconds were taken on a busy machine of two cores. Made by "
        "`python -m benchmarks.all_agents`."
    )
    text = [
        "# All agents",
        "",
        *table,
        "",
        note,
    ]
    page = keep(args.out, "all_agents", text)
    if args.out == RESULTS and args.agents == tuple(TRAITS):
        update_readme(RESULTS.parents[1] / "agents" / "README.md", table, note)
    print(page)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
