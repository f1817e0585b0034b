"""PFM's offline-RL experiment: does a generator of segments act better once pairs of them were compared?

    python -m benchmarks.segments                    Pendulum-v1 and Hopper-v5, three skills, five seeds
    python -m benchmarks.segments --envs Pendulum-v1

Protocol of Kim et al. 2024 (arXiv 2405.20234, section 5.3), on behaviour of our own (``benchmarks/behaviour.py``)
instead of D4RL's. The reference is behaviour cloning (BC): a flow that makes ten actions for the state they begin
in. About a thousand pairs of its segments, two of a state, are labelled by their true return; DPO, PFM and
marginal BC (flow matching on the preferred ones alone) learn from them, and then **act in the env**: in every
state a segment is made and its first action is done. The normalised return is 0 for uniform actions and 100 for
the expert.

Found: what was asked for grows everywhere, with DPO before PFM before marginal BC; what comes of it depends on how
far ten steps see. In Pendulum (half a second) PFM and marginal BC act better than the medium behaviour they
started from in every seed, DPO in three of five; in Hopper (0.08 seconds) all act worse than medium and expert
behaviour, and the more they earn in ten steps, the less in an episode.

Writes ``segments.jsonl`` (a line a run), ``segments.md`` and ``segments.png`` to
``benchmarks/results/``.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.pages import keep, once
from prefenv import plotting
from prefenv.checkpoints import shipped
from prefenv.device import make_generator
from prefenv.oracle import scored
from prefenv.registry import make_agent, make_oracle
from prefenv.runs import RunConfig
from prefenv.tasks.segments import Segments

RESULTS = Path(__file__).parent / "results"
SKILLS = ("random", "medium", "expert")
# Name in the table: agent (None = the reference itself), rounds. PFM's own way is one round. Settings: the best of
# four or five trials of each on seed 100, by the mean normalised return in both envs' medium.
METHODS: dict[str, tuple[str, int] | None] = {
    "BC": None,
    "DPO": ("flow-dpo:lr=1e-3,updates=75", 8),
    "PFM": ("pfm:coupling=pair,margin=False,updates=600,lr=1e-3,tie=0.0", 1),
    "marginal BC": ("rft:keep=best,updates=600,lr=1e-3", 1),
}


@dataclass(frozen=True)
class Args:
    """Compare BC, DPO, PFM and marginal BC in control tasks.

    Args:
        envs: Ids of control tasks whose behaviour and references are there.
        skills: Whose behaviour is cloned.
        methods: Which methods.
        seeds: How many seeds, from ``first``.
        first: The first seed.
        queries: Judged segments of each method, two a pair.
        episodes: Episodes that each model plays.
        work: Folder of finished runs, which are not repeated.
        out: Folder of the results.
    """

    envs: tuple[str, ...] = ("Pendulum-v1", "Hopper-v5")
    skills: tuple[str, ...] = SKILLS
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: int = 5
    first: int = 0
    queries: int = 2048
    episodes: int = 10
    work: Path = Path("runs/segments")
    out: Path = RESULTS


@torch.no_grad()
def play(env_id: str, task: Segments, model: Any, episodes: int, seed: int) -> np.ndarray:
    """Returns ``(episodes,)`` of a model that plans in every state and does the first action of its plan.

    Args:
        env_id: The real env.
        task: Whose conditions and actions the model knows.
        model: With ``sample(noise, condition)``.
        episodes: Envs side by side, one episode each.
        seed: Of their beginnings, and of the model's noises.
    """
    envs: Any = gym.make_vec(env_id, num_envs=episodes, vectorization_mode="sync")
    noise = make_generator(seed, stream="play")
    observation, _ = envs.reset(seed=[1000 * seed + i for i in range(episodes)])
    total, alive = np.zeros(episodes), np.ones(episodes, bool)
    while alive.any():
        condition = task.standard(torch.from_numpy(observation).float())
        z = torch.randn(episodes, *task.event_shape, generator=noise)
        plans = task.actions(model.sample(z, condition))
        observation, reward, terminated, truncated, _ = envs.step(plans[:, 0].astype(np.float32))
        total += np.where(alive, reward, 0.0)
        alive &= ~(terminated | truncated)
    envs.close()
    return total


def run(args: Args, env_id: str, skill: str, method: str, seed: int) -> dict[str, Any]:
    """One model: made, asked for segments of fixed states, and let loose in the env."""
    began, made = time.process_time(), METHODS[method]
    agent, rounds = made or ("rft", 1)
    config = RunConfig(
        agent=agent,
        task=f"segments:env={env_id},skill={skill}",
        oracle="segment-return:answer=best",
        queries=args.queries,
        panel_size=2,
        rows=args.queries // rounds,
        seed=seed,
        device="cpu",
    )
    env = config.make_env()
    task: Any = env.unwrapped.task
    model: Any = env.unwrapped.reference
    if made:
        model = make_agent(config.agent, env, seed=seed).learn(args.queries)
    oracle = make_oracle("segment-return", task)
    asked = task.draw_conditions(512, make_generator(0, stream="segments benchmark"))
    noise = torch.randn(512, *task.event_shape, generator=make_generator(0, stream="segments"))
    with torch.no_grad():
        x = model.sample(noise, asked)
    returns = play(env_id, task, model, args.episodes, seed)
    known = behaviour_returns(env_id)
    low, high = known["random"]["return"], known["expert"]["return"]
    return {
        "env": env_id,
        "skill": skill,
        "method": method,
        "agent": made and made[0],
        "seed": seed,
        "queries": args.queries if made else 0,
        "segment_score": float(scored(oracle, x, asked).mean()),
        "residual": float(task.residual(x).median()),
        "return": float(returns.mean()),
        "returns": [round(float(r), 2) for r in returns],
        "normalised": 100 * (float(returns.mean()) - low) / (high - low),
        "seconds": round(time.process_time() - began, 1),
    }


def finished(args: Args, env_id: str, skill: str, method: str, seed: int) -> dict[str, Any]:
    """A run's row, from its file if it was finished before."""
    name = f"{env_id}-{skill}-{method}-s{seed}-{args.queries}-{args.episodes}".replace(" ", "-")
    file = args.work / f"{name.lower()}.json"
    return once(file, lambda: run(args, env_id, skill, method, seed))


def behaviour_returns(env_id: str) -> dict[str, Any]:
    """What is known of the behaviour that comes with the package."""
    return json.loads(shipped(f"behaviour/{env_id.lower()}", ".json").read_text())


def behaved(env_id: str) -> list[str]:
    """The mean returns of each skill, in words."""
    known = behaviour_returns(env_id)
    return [f"{skill} {known[skill]['return']:.0f}" for skill in SKILLS]


def cell(values: list[float], digits: int = 1) -> str:
    """Mean, and standard deviation over the seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def values(rows: list[dict[str, Any]], key: str) -> dict[tuple[str, str], dict[str, list[float]]]:
    """A column's values over the seeds, by env and skill, and by method."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for r in rows:
        found.setdefault((r["env"], r["skill"]), {}).setdefault(r["method"], []).append(r[key])
    return found


def table(rows: list[dict[str, Any]], key: str, digits: int = 1) -> list[str]:
    """A Markdown line for each env and skill, a column for each method, and the means over all."""
    methods, found = list(dict.fromkeys(r["method"] for r in rows)), values(rows, key)
    lines = [f"| behaviour | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
    for (env_id, skill), mine in found.items():
        cells = [cell(mine[m], digits) for m in methods]
        lines.append(f"| {env_id}, {skill} | {' | '.join(cells)} |")
    means = [statistics.mean(statistics.mean(mine[m]) for mine in found.values()) for m in methods]
    return [*lines, "| mean | " + " | ".join(f"{m:.{digits}f}" for m in means) + " |"]


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Normalised returns: bars are means, points are seeds."""
    methods, found = list(dict.fromkeys(r["method"] for r in rows)), values(rows, "normalised")
    with plotting.style():
        drawn = Figure(figsize=(8, 3.2), layout="constrained")
        axes, width = drawn.add_subplot(), 0.8 / len(methods)
        for k, method in enumerate(methods):
            mine = [each[method] for each in found.values()]
            at = np.arange(len(mine)) + (k - (len(methods) - 1) / 2) * width
            means = [statistics.mean(m) for m in mine]
            axes.bar(at, means, 0.9 * width, color=f"C{k}", alpha=0.6, label=method)
            for x, seeds in zip(at, mine, strict=True):
                axes.scatter([x] * len(seeds), seeds, s=8, color=f"C{k}", zorder=3)
        axes.axhline(0, color="0.5", lw=0.8)
        axes.set_xticks(range(len(found)), [f"{env_id}\n{skill}" for env_id, skill in found])
        axes.set_ylabel("normalised return")
        drawn.legend(frameon=False, ncols=len(methods), loc="outside upper center")
    return drawn


def main(args: Args) -> None:
    """Run what is missing, and write the results."""
    torch.set_num_threads(1)
    todo = [
        (env_id, skill, method, seed)
        for env_id in args.envs
        for skill in args.skills
        for method in args.methods
        for seed in range(args.first, args.first + args.seeds)
    ]
    bar = tqdm(todo, desc="segments", unit="run")
    rows = []
    for case in bar:
        bar.set_postfix_str(", ".join(map(str, case)))
        rows.append(finished(args, *case))
    settings = [f"{m}: `{made[0]}`" for m, made in METHODS.items() if made and m in args.methods]
    told = [f"{env_id}: {', '.join(behaved(env_id))}" for env_id in args.envs]
    lines = [
        "# Segments: PFM's offline-RL experiment, rolled out in the real env",
        "",
        f"`python -m benchmarks.segments --seeds {args.seeds} --queries {args.queries}`: {args.queries // 2} "
        f"pairs of the reference's segments labelled by their true return, {args.episodes} episodes a model, "
        f"seeds {args.first} to {args.first + args.seeds - 1}. BC is one model; its seeds are those of the "
        f"episodes. {'; '.join(settings)}.",
        "",
        "Normalised return (mean ± standard deviation over the seeds): 0 = uniform actions, 100 = the expert; the "
        f"returns of the behaviour itself: {'; '.join(told)}.",
        "",
        *table(rows, "normalised"),
        "",
        "What was asked for: mean score of 512 segments, each for a state of the data (0.5 = as good as doing "
        "nothing).",
        "",
        *table(rows, "segment_score", 3),
        "",
        "![normalised returns](segments.png)",
    ]
    text = keep(args.out, "segments", lines, rows)
    figure(rows).savefig(args.out / "segments.png", dpi=150)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
