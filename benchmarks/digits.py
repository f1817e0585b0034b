"""PFM's image experiment at 8 x 8: which digit was asked for, before and after alignment.

    python -m benchmarks.digits            some 6 minutes of one core
    python -m benchmarks.digits --task digits:data_path=mnist.npz

The second is for other pictures, of which there must be a reference (``prefenv train --task ...``) and a judge
(``python -m oracles.lenet --task ...``).

Protocol of Kim et al. 2024 (arXiv 2405.20234, section 5.1): samples of the conditional reference, preferred by the
probability that a LeNet gives to the asked digit; pairs of the **best and the worst** of a panel, or **random**
pairs; every method gets as many judged samples. PFM learns the pairs of Algorithm 1 and is applied once,
and again to what came out. ``benchmarks/results/digits.md`` has the table, ``digits.jsonl`` the numbers,
``digits.png`` samples from the same noises; another task's files have its name.

The judge is the reward, so it cannot say whether it was fooled. The last two columns do not know it: the digit of
the nearest real picture, and the distance to it.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.pages import keep, once
from prefenv import plotting
from prefenv.device import make_generator
from prefenv.errors import PrefenvError
from prefenv.oracle import scored
from prefenv.registry import make_agent, make_oracle, make_task
from prefenv.runs import RunConfig

RESULTS = Path(__file__).parent / "results"
# protocol: panel size, and how the oracle answers.
PAIRS = {"best and worst": (16, "extremes"), "random": (2, "best")}
# name in the table: agent, rounds. PFM's own way is one round: a data set, then a flow.
METHODS = {
    "RLHF (`ppo`)": ("ppo", 8),
    "DPO (`flow-dpo`)": ("flow-dpo", 8),
    "PFM": ("pfm:coupling=pair,margin=False,updates={pfm_updates}", 1),
}
COLUMNS = ("score", "preferred_rate", "nearest", "residual")


@dataclass(frozen=True)
class Args:
    """Run it.

    Args:
        task: The task; settings may follow, ``digits:data_path=mnist.npz``.
        seeds: How many seeds, from 0.
        queries: Judged samples of each method, a multiple of 128.
        pfm_updates: Gradient steps of the preference flow.
        applications: Times that the preference flow is applied, at most.
        per_digit: Samples of each digit that are scored.
        work: Folder of finished parts, which are not repeated.
        out: Folder of the results.
    """

    task: str = "digits"
    seeds: int = 2
    queries: int = 2048
    pfm_updates: int = 300
    applications: int = 3
    per_digit: int = 100
    work: Path = Path("runs/digits")
    out: Path = RESULTS


def config(args: Args, method: str, pairs: str, seed: int) -> RunConfig:
    """What a part runs; ``data``, which is the protocol's data set, has no agent of its own."""
    agent, rounds = METHODS.get(method, ("ppo", 1))
    panel_size, answer = PAIRS[pairs]
    return RunConfig(
        agent=agent.format(**asdict(args)),
        task=args.task,
        oracle=f"legible:answer={answer}",
        queries=args.queries,
        panel_size=panel_size,
        rows=args.queries // rounds,
        seed=seed,
        device="cpu",
    )


class Bench:
    """The task, its judge, and what is scored.

    Args:
        task: The task, by name.
        per_digit: Samples of each digit.
    """

    def __init__(self, task: str, per_digit: int):
        self.task: Any = make_task(task)
        self.oracle = make_oracle("legible", self.task)
        self.asked = self.task.fixed_conditions().repeat(per_digit)
        rng = make_generator(0, stream="benchmark digits")
        self.noise = torch.randn(len(self.asked), *self.task.event_shape, generator=rng)

    @torch.no_grad()
    def measure(self, x: Tensor, asked: Tensor) -> dict[str, float]:
        """What samples of asked digits are worth."""
        score = scored(self.oracle, x, asked)
        near, digit = self.task.near(x)
        return {
            "score": float(score.mean()),
            "preferred_rate": float((score >= self.oracle.threshold).double().mean()),
            "nearest": float((digit == asked).double().mean()),
            "residual": float(near.median()),
        }

    def known(self, task: str, start: Tensor) -> list[dict[str, Any]]:
        """The rows of real pictures, and of the reference's samples ``start``."""
        real = self.task.data(1000, make_generator(0), "test")
        size = " x ".join(map(str, self.task.event_shape[1:]))
        about = {"task": task, "size": size, "samples": len(start)}
        return [
            {"model": "real pictures (test part)", **self.measure(*real)},
            {"model": "reference", **about, **self.measure(start, self.asked)},
        ]

    def data_set(self, args: Args, pairs: str, seed: int) -> dict[str, dict[str, float]]:
        """The reference's samples that the protocol prefers and rejects."""
        env = config(args, "data", pairs, seed).make_env().unwrapped
        env.reset(seed=seed)
        x = env.reference.sample(env._x, env.condition)
        told = env.judge(x, None, env.condition)
        return {
            name: self.measure(x[told == value], env.condition[told == value])
            for name, value in (("preferred", 1.0), ("rejected", 0.0))
        }

    def run(self, args: Args, method: str, pairs: str, seed: int) -> dict[str, Tensor]:
        """Samples of an aligned model, by name; of PFM, after each application."""
        todo = config(args, method, pairs, seed)
        agent = make_agent(todo.agent, todo.make_env(), seed=seed)
        agent.learn(args.queries)
        if method != "PFM":
            return {method: agent.sample(self.noise, self.asked)}
        policy, made = agent.env.policy(agent.model), {}
        x = agent.env.reference.sample(self.noise, self.asked)
        for n in range(1, args.applications + 1):
            x = policy.sample(x, self.asked)
            made["PFM" if n == 1 else f"PFM x {n}"] = x
        return made


def part(args: Args, bench: Bench, method: str, pairs: str, seed: int) -> list[dict[str, Any]]:
    """The rows of one part."""
    about: dict[str, Any] = {"pairs": pairs, "seed": seed, "queries": args.queries}
    began = time.process_time()
    if method == "data":
        rows = [{"model": k, **v} for k, v in bench.data_set(args, pairs, seed).items()]
    else:
        made = bench.run(args, method, pairs, seed)
        about |= {"agent": config(args, method, pairs, seed).agent, "rounds": METHODS[method][1]}
        rows = [
            {
                "model": name,
                **bench.measure(x, bench.asked),
                "seconds": time.process_time() - began,
                "shown": (x[:20].clamp(-1, 1) * 100).round().int().tolist(),
            }
            for name, x in made.items()
        ]
    return [{**about, **row} for row in rows]


def part_name(args: Args, method: str, pairs: str, seed: int) -> str:
    """A part's name, which tells all that decides its rows: most of it by the run's hash."""
    plain = f"{method}-{pairs}".translate({ord(c): None for c in " `()"})
    run = config(args, method, pairs, seed).name
    return f"{plain}-{run}-{args.applications}-{args.per_digit}"


def finished(args: Args, bench: Bench, method: str, pairs: str, seed: int) -> list[dict[str, Any]]:
    """The rows of one part, from its file if it was finished before."""
    file = args.work / f"{part_name(args, method, pairs, seed)}.json"
    return once(file, lambda: part(args, bench, method, pairs, seed))


def cell(values: list[float]) -> str:
    """Mean, and range where there are several."""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4f} to {max(values):.4f})"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown line for each model and protocol; real pictures and reference, which have none, come first."""
    heads = (
        "model",
        "pairs",
        "preference score",
        "preferred rate",
        "nearest real is the asked one",
        "distance",
    )
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for pairs in ("", *PAIRS):
        mine = [r for r in rows if r.get("pairs", "") == pairs]
        for name in dict.fromkeys(r["model"] for r in mine):
            cells = [cell([r[c] for r in mine if r["model"] == name]) for c in COLUMNS]
            lines.append(f"| {name} | {pairs} | {' | '.join(cells)} |")
    return lines


def page(rows: list[dict[str, Any]]) -> list[str]:
    """The page's lines."""
    (reference,) = [r for r in rows if r["model"] == "reference"]
    runs = [r for r in rows if "pairs" in r]
    seeds, queries = len({r["seed"] for r in runs}), runs[0]["queries"]
    task = "" if reference["task"] == "digits" else f" --task {reference['task']}"
    told: dict[str, str] = {}  # PFM's later applications are of the same agent
    for r in runs:
        if "agent" in r:
            told.setdefault(r["agent"], f"{r['model']}: `{r['agent']}`, rounds: {r['rounds']}")
    return [
        f"# Digits: PFM's image experiment at {reference['size']}",
        "",
        f"`python -m benchmarks.digits{task} --seeds {seeds} --queries {queries}`: {queries} judged "
        f"samples a method, {reference['samples']} samples scored; mean (range) over the seeds. *Best and worst*: "
        f"of panels of {PAIRS['best and worst'][0]} samples of one digit; *random*: panels of 2. *Preferred* and "
        "*rejected* are the reference's samples that the protocol chose. The distance is the median, per pixel "
        "(the real pictures are themselves among those that it is taken to).",
        "",
        f"Agents, with their defaults where nothing is said: {'; '.join(told.values())}. RLHF optimises the "
        "judge's answers themselves (1 for the preferred sample, 0 for the rejected one), with no fitted reward "
        "in between, because the Bradley-Terry reward of `prefenv/reward.py` takes no conditions.",
        "",
        *table(rows),
    ]


def figure(bench: Bench, rows: list[dict[str, Any]], reference: Tensor) -> Any:
    """Twenty samples of each model, from the same noises."""
    mine = [
        r for r in rows if r.get("pairs") == "best and worst" and r["seed"] == 0 and "shown" in r
    ]
    shown = [torch.tensor(r["shown"]) / 100 for r in mine]
    sheets = [x.numpy() for x in (reference[:20], *shown)]
    names = ["reference", *[r["model"].replace("`", "").split(" (")[0] for r in mine]]
    colors = [plotting.RED, *[plotting.GREEN] * len(mine)]
    return plotting.sheet(bench.task, sheets, colors, names, size=0.5)


def main(args: Args) -> None:
    """Run what is missing, and write the results."""
    bench = Bench(args.task, args.per_digit)
    with torch.no_grad():
        policy = config(args, "data", "random", 0).make_env().unwrapped.reference
        start = policy.sample(bench.noise, bench.asked)
    rows = bench.known(args.task, start)
    for seed in range(args.seeds):
        for pairs in PAIRS:
            for method in ("data", *METHODS):
                rows += finished(args, bench, method, pairs, seed)
                print(f"seed {seed}, {pairs}, {method}", flush=True)
    plain = [{k: v for k, v in r.items() if k != "shown"} for r in rows]
    text = keep(args.out, bench.task.name, page(rows), plain)
    figure(bench, rows, start).savefig(args.out / f"{bench.task.name}.png")
    print(text)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except PrefenvError as error:
        raise SystemExit(f"benchmarks.digits: {error}") from None
