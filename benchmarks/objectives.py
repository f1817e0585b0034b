"""D3PO's objectives on digits: fewer bytes, more bytes, a better-looking hand, each learned from pairs alone.

    python -m benchmarks.objectives        some 3 minutes of one core; finished runs are not repeated

Yang et al. 2023 (D3PO, arXiv 2311.13231) align with compressibility, incompressibility and an aesthetic predictor;
the prompt is the digit here. Two samples of a digit are compared, and ``d3po`` learns from which is better. Each
model is looked at by all objectives, and by the judge of the digits, which no objective asks: what of the prompt
is given up. Writes ``objectives.jsonl`` (a line a run) and ``objectives.md`` to ``benchmarks/results/``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from benchmarks.pages import keep, once, spread
from oracles.jpeg import jpeg_bytes
from prefenv.device import make_generator
from prefenv.oracle import scored
from prefenv.registry import make_agent, make_oracle, make_task
from prefenv.runs import RunConfig

RESULTS = Path(__file__).parent / "results"
QUALITY = 90  # of the JPEG
# By four trials on seed 100: the defaults belong to shapes, and hardly move pictures.
AGENT = "d3po:lr=3e-3,eps=0.5,anchor=0.1"
OBJECTIVES = {  # name: the oracle, and which measure it wants to move where
    "compressibility": ("jpeg:prefer=small,answer=best", "bytes", -1),
    "incompressibility": ("jpeg:prefer=large,answer=best", "bytes", 1),
    "aesthetic": ("aesthetic:answer=best", "aesthetic", 1),
}
MEASURES = {"bytes": 1, "aesthetic": 3, "legible": 3, "residual": 3}  # with their digits


@dataclass(frozen=True)
class Args:
    """Align digits with D3PO's objectives.

    Args:
        agent: The agent; settings may follow.
        seeds: How many seeds, from 0.
        queries: Judged samples of each run, two a pair.
        per_digit: Samples of each digit that are looked at.
        work: Folder of finished runs.
        out: Folder of the results.
    """

    agent: str = AGENT
    seeds: int = 3
    queries: int = 2048
    per_digit: int = 100
    work: Path = Path("runs/objectives")
    out: Path = RESULTS


@torch.no_grad()
def measure(task: Any, x: Tensor, asked: Tensor) -> dict[str, float]:
    """Means of what a set of pictures is worth; its residual's median."""
    return {
        "bytes": float(jpeg_bytes(x, QUALITY).mean()),
        "aesthetic": float(scored(make_oracle("aesthetic", task), x, asked).mean()),
        "legible": float(scored(make_oracle("legible", task), x, asked).mean()),
        "residual": float(task.residual(x).median()),
    }


def config(args: Args, objective: str, seed: int) -> RunConfig:
    """What a run does: rounds of 128 pairs."""
    return RunConfig(
        agent=args.agent,
        task="digits",
        oracle=OBJECTIVES[objective][0],
        queries=args.queries,
        panel_size=2,
        rows=min(256, args.queries),
        seed=seed,
        device="cpu",
    )


def run(args: Args, objective: str | None, seed: int) -> dict[str, Any]:
    """A line: of a model aligned with an objective, or of the reference (None)."""
    task: Any = make_task("digits")
    asked = task.fixed_conditions().repeat(args.per_digit)
    rng = make_generator(0, stream="objectives")
    noise = torch.randn(len(asked), *task.event_shape, generator=rng)
    todo = config(args, objective or "aesthetic", seed)
    env = todo.make_env()
    model: Any = env.unwrapped.reference
    if objective:
        model = make_agent(todo.agent, env, seed=seed).learn(args.queries)
    with torch.no_grad():
        x = model.sample(noise, asked)
    about = {"objective": objective or "none: the reference", "seed": seed}
    return {**about, "agent": objective and args.agent, **measure(task, x, asked)}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown line an objective: median and range over the seeds."""
    heads = ("objective", "JPEG bytes", "aesthetic", "legible", "distance to a real digit")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in dict.fromkeys(r["objective"] for r in rows):
        mine = [r for r in rows if r["objective"] == name]
        cells = [spread([r[k] for r in mine], digits) for k, digits in MEASURES.items()]
        if len(mine) == 1:
            cells = [cell.partition(" ")[0] for cell in cells]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main(args: Args) -> None:
    """Run what is missing, and write the results."""
    torch.set_num_threads(1)
    todo: list[tuple[str | None, int]] = [(None, 0)]
    todo += [(name, seed) for name in OBJECTIVES for seed in range(args.seeds)]
    rows = []
    for objective, seed in tqdm(todo, unit="run"):
        known = config(args, objective or "aesthetic", seed).name
        file = args.work / f"{objective or 'reference'}-{known}-{args.per_digit}.json"
        rows.append(once(file, lambda o=objective, s=seed: run(args, o, s)))
    lines = [
        "# D3PO's objectives on digits",
        "",
        f"`python -m benchmarks.objectives --agent {args.agent} "
        f"--seeds {args.seeds} --queries {args.queries}`: "
        f"{args.queries // 2:,} pairs a run, {10 * args.per_digit:,} pictures looked at; median (range) over the "
        f"seeds. Bytes at JPEG quality {QUALITY}; *aesthetic*: how much it looks like a real hand's to a small "
        "network; *legible*: the probability of the digit that was asked for, which no objective asks about.",
        "",
        *table(rows),
    ]
    print(keep(args.out, "objectives", lines, rows))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
