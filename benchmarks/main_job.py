"""The main job over seeds: four agents at 4,096 judged samples, and ``hil-dd`` after three informative panels.

    python -m benchmarks.main_job            about 5 minutes on 2 cores; finished runs are not repeated

Writes ``main_job.jsonl`` (a summary a run), ``main_job.md`` (the tables) and the demo's two figures to
``benchmarks/results/``, and the table to the README, between its ``results`` marks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import tyro

from benchmarks.pages import keep, spread, update_readme
from prefenv.demo import compare, demo
from prefenv.evaluation import Evaluation, Judge
from prefenv.registry import make_agent
from prefenv.runs import RunConfig

RESULTS = Path(__file__).parent / "results"
AGENTS = ("hil-dd", "pfm", "d3po", "ppo")
_NUMBERS = {
    "preferred_rate": "preferred rate",
    "score": "score",
    "residual_ratio": "residual / reference's",
    "diversity": "diversity",
    "kl_nats": "KL (nats)",
    "frontier_kl_nats": "frontier KL",
    "seconds": "seconds",
}


@dataclass(frozen=True)
class Args:
    """Run the main job over seeds.

    Args:
        seeds: How many seeds, from 0.
        queries: Budget of each run in judged samples.
        work: Folder of the run directories.
        out: Folder of the results.
    """

    seeds: int = 5
    queries: int = 4096
    work: Path = Path("runs/main_job")
    out: Path = RESULTS


def after_panels(judge: Judge, seed: int, panels: int = 3) -> tuple[Evaluation, int]:
    """``hil-dd`` stopped after so many informative panels of 4, and how many panels it was shown."""
    env = gym.make_vec("prefenv/Shapes-v0", num_envs=4, panel_size=4)
    agent = make_agent("hil-dd", env, seed=seed)
    seen = 0.0

    def stop(_: object, metrics: dict[str, float]) -> bool:
        nonlocal seen
        seen += metrics["informative"]
        return seen < panels

    agent.learn(4000, callback=stop)
    return judge.evaluate(agent), agent.env.ledger.panels


def agent_table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown line per agent: median and range over the seeds."""
    lines = [f"| agent | {' | '.join(_NUMBERS.values())} |", "|---" * (len(_NUMBERS) + 1) + "|"]
    for agent in AGENTS:
        mine = [r for r in rows if r["agent"] == agent]
        cells = [
            spread([r[k] for r in mine], 1 if k in ("kl_nats", "seconds") else 3) for k in _NUMBERS
        ]
        lines.append(f"| `{agent}` | {' | '.join(cells)} |")
    return lines


def main(args: Args) -> None:
    """Run what is missing, and write the results."""
    base = RunConfig(queries=args.queries)
    judge = base.judge()
    rows = []
    for seed in range(args.seeds):
        configs = [dataclasses.replace(base, agent=a, seed=seed) for a in AGENTS]
        rows += compare(configs, args.work / f"seed{seed}", judge)
    for row in rows:
        row["residual_ratio"] = row["residual"] / row["reference_residual"]
    table = agent_table(rows)
    lines = [
        "# The main job: four agents, one budget",
        "",
        f"`python -m benchmarks.main_job`, {args.seeds} seeds from 0, {args.queries} judged samples in panels of "
        f"4. Median and range over the seeds. Reference: preferred rate "
        f"{rows[0]['reference_preferred_rate']:.3f}, residual {rows[0]['reference_residual']:.4f}; "
        f"optimum at beta {judge.beta}: score against itself {judge.optimum_score:.3f}, "
        f"mean reward {judge.optimum_reward:.3f}, KL {judge.optimum_kl:.2f} nats.",
        "",
        *table,
    ]
    few = [after_panels(judge, seed) for seed in range(args.seeds)]
    lines += [
        "",
        "`hil-dd` after 3 informative panels of 4 (some but not all of the four chosen): preferred rate "
        f"{spread([e.preferred_rate for e, _ in few])}, score {spread([e.score for e, _ in few])}, residual "
        f"{spread([e.residual / e.reference_residual for e, _ in few], 2)} times the reference's; panels shown: "
        f"{', '.join(str(n) for _, n in few)}.",
    ]
    rows += [
        {
            "experiment": "hil-dd after 3 informative panels",
            "seed": s,
            "panels": n,
            **dataclasses.asdict(e),
        }
        for s, (e, n) in enumerate(few)
    ]
    text = keep(args.out, "main_job", lines, rows)
    demo(args.work / "seed0", AGENTS, base)
    for name in ("shapes.png", "frontier.png"):
        (args.out / name).write_bytes((args.work / "seed0" / name).read_bytes())
    if args.out == RESULTS:
        note = (
            f"Median (range) over {args.seeds} seeds at {args.queries:,} judged samples, one core a run (of a "
            "busy machine). The reference's preferred rate is "
            f"{rows[0]['reference_preferred_rate']:.3f}. "
            "Made by `python -m benchmarks.main_job`."
        )
        update_readme(RESULTS.parents[1] / "README.md", table, note)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
