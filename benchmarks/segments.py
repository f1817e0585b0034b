"""PFM's offline-RL experiment: does a generator of segments act better once pairs of them were compared?

    python -m benchmarks.segments                    Pendulum-v1 and Hopper-v5, three skills, five seeds
    python -m benchmarks.segments --envs Pendulum-v1
    python -m benchmarks.segments --envs Hopper-v5 --data-path hopper_medium-v2.hdf5 --returns -20.3 3234.3

Protocol of Kim et al. 2024 (arXiv 2405.20234, section 5.3), on behaviour of our own (``benchmarks/behaviour.py``)
instead of D4RL's. The reference is behaviour cloning (BC): a flow that makes ten actions for the state they begin
in. About a thousand pairs of its segments, two of a state, are labelled by their true return; DPO, PFM and
marginal BC (flow matching on the preferred ones alone) learn from them, and then **act in the env**: in every
state a segment is made and its first action is done. The normalised return is 0 for uniform actions and 100 for
the expert. The third line is for a file of D4RL's or Minari's, of which there must be a reference
(``prefenv train --task segments:env=...,data_path=...``), and whose 0 and 100 are told.

Found: what was asked for grows everywhere, with DPO before PFM before marginal BC (in Pendulum's expert behaviour
all alike); what comes of it depends on how far ten steps see. In Pendulum (half a second) PFM and marginal BC act
better than BC of the medium behaviour in every seed, DPO in three of five; of the random one all three do on
average, and of the expert one, where little is left to gain, none does. In Hopper (0.08 seconds) all three act
worse than BC of medium and expert behaviour, and the more they earn in ten steps, the less in an episode; of the
random one PFM and marginal BC act as before, DPO worse.

Writes ``segments.jsonl`` (a line a run), ``segments.md`` and ``segments.png`` to
``benchmarks/results/``; for a file, under its task's name.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, replace
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
from prefenv.errors import ConfigError, PrefenvError
from prefenv.oracle import scored
from prefenv.registry import make_agent, make_oracle, make_task
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
        data_path: A file of behaviour in the one env, instead of skills.
        returns: Of that env, which the normalised return calls 0 and 100.
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
    data_path: Path | None = None
    returns: tuple[float, float] | None = None
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


def task_text(args: Args, env_id: str, skill: str) -> str:
    """The task of a skill, or of the file."""
    source = f"skill={skill}" if args.data_path is None else f"data_path={args.data_path}"
    return f"segments:env={env_id},{source}"


def checked(args: Args) -> Args:
    """The arguments; a file's one skill is named after its task.

    Raises:
        ConfigError: A file without its env, returns or reference, or returns without a file.
    """
    if args.data_path is None and args.returns is None:
        return args
    if args.data_path is None or args.returns is None or len(args.envs) != 1:
        raise ConfigError("a file wants --data-path FILE, --envs ID and --returns RANDOM EXPERT")
    if not args.returns[0] < args.returns[1]:
        raise ConfigError(f"--returns {args.returns}: the expert's is the larger one")
    text = task_text(args, args.envs[0], "")
    name = make_task(text).name
    if not shipped(name).is_file():
        raise ConfigError(f"{name} has no reference yet; make it with: prefenv train --task {text}")
    return replace(args, skills=(name,))


def config(args: Args, env_id: str, skill: str, method: str, seed: int) -> RunConfig:
    """What a run does; BC, which does nothing, has no agent of its own."""
    agent, rounds = METHODS[method] or ("rft", 1)
    return RunConfig(
        agent=agent,
        task=task_text(args, env_id, skill),
        oracle="segment-return:answer=best",
        queries=args.queries,
        panel_size=2,
        rows=args.queries // rounds,
        seed=seed,
        device="cpu",
    )


def run(args: Args, env_id: str, skill: str, method: str, seed: int) -> dict[str, Any]:
    """One model: made, asked for segments of fixed states, and let loose in the env."""
    began, made = time.process_time(), METHODS[method]
    asked_for = config(args, env_id, skill, method, seed)
    env = asked_for.make_env()
    task: Any = env.unwrapped.task
    model: Any = env.unwrapped.reference
    if made:
        model = make_agent(asked_for.agent, env, seed=seed).learn(args.queries)
    oracle = make_oracle("segment-return", task)
    asked = task.draw_conditions(512, make_generator(0, stream="segments benchmark"))
    noise = torch.randn(512, *task.event_shape, generator=make_generator(0, stream="segments"))
    with torch.no_grad():
        x = model.sample(noise, asked)
    returns = play(env_id, task, model, args.episodes, seed)
    low, high = args.returns or [
        behaviour_returns(env_id)[s]["return"] for s in ("random", "expert")
    ]
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


def run_name(args: Args, env_id: str, skill: str, method: str, seed: int) -> str:
    """A run's name, which tells all that decides its row: most of it by the hash."""
    hashed = config(args, env_id, skill, method, seed).name
    ends = "".join(f"-{r:g}" for r in args.returns or ())
    name = f"{env_id}-{skill}-{method}-{hashed}-{args.episodes}{ends}"
    return name.replace(" ", "-").lower()


def finished(args: Args, env_id: str, skill: str, method: str, seed: int) -> dict[str, Any]:
    """A run's row, from its file if it was finished before."""
    file = args.work / f"{run_name(args, env_id, skill, method, seed)}.json"
    return once(file, lambda: run(args, env_id, skill, method, seed))


def behaviour_returns(env_id: str) -> dict[str, Any]:
    """What is known of the behaviour that comes with the package."""
    return json.loads(shipped(f"behaviour/{env_id.lower()}", ".json").read_text())


def behaved(args: Args, env_id: str) -> str:
    """The mean returns of each skill, in words; of a file, what is 0 and 100."""
    if args.returns is not None:
        return f"{env_id}: uniform {args.returns[0]:g}, expert {args.returns[1]:g}"
    known = behaviour_returns(env_id)
    told = [f"{skill} {known[skill]['return']:.0f}" for skill in SKILLS]
    return f"{env_id}: {', '.join(told)}"


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
    args = checked(args)
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
    told = [behaved(args, env_id) for env_id in args.envs]
    name = "segments" if args.data_path is None else args.skills[0]
    file = "" if args.data_path is None else f" --envs {args.envs[0]} --data-path {args.data_path}"
    lines = [
        "# Segments: PFM's offline-RL experiment, rolled out in the real env",
        "",
        f"`python -m benchmarks.segments{file} --seeds {args.seeds} --queries {args.queries}`: "
        f"{args.queries // 2} pairs of the reference's segments labelled by their true return, "
        f"{args.episodes} episodes a model, seeds {args.first} to {args.first + args.seeds - 1}. "
        f"BC is one model; its seeds are those of the episodes. {'; '.join(settings)}.",
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
        f"![normalised returns]({name}.png)",
    ]
    text = keep(args.out, name, lines, rows)
    figure(rows).savefig(args.out / f"{name}.png", dpi=150)
    print(text)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except PrefenvError as error:
        raise SystemExit(f"benchmarks.segments: {error}") from None
