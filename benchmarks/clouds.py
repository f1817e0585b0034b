"""HIL-DD's toy on its own published checkpoint: its update, and ours, after 1, 2 and 3 informative panels.

    python -m benchmarks.clouds rectified_model_ckp1.pt         about 20 minutes on one core

Both start from the same network (``prefenv import-hil-dd``), show panels of four and are told which are S curves;
a panel is informative if some are and some are not. ``hil-dd`` learns as the toy does, one Adam step of 1e-3 a
panel; ``learned-reward`` chooses what it asks from its own samples. Measured on 48 fixed noises: share of S
curves, and median Chamfer distance to the nearer curve, also in units of real clouds' own. Writes
``clouds.jsonl`` (a line a run and panel), ``clouds.md`` and ``clouds.png`` to ``benchmarks/results/``.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from benchmarks.pages import keep
from oracles.s_cloud import SCloud
from prefenv import plotting
from prefenv.device import make_generator
from prefenv.envs import FlowVectorEnv
from prefenv.hil_dd import TASK, read_hil_dd
from prefenv.registry import agent_config, make_agent, make_task
from prefenv.tasks.clouds import ROLL, S_CURVE

RESULTS = Path(__file__).parent / "results"
AGENTS = {
    "hil-dd": "hil-dd:lr=1e-3,updates=1,horizon=1.0,times={times},data_batch={data}",
    "learned-reward": "learned-reward:pool=384,effective=32,growth=1,anchors=48,updates=80,batch=16",
}
PANELS = 3


class Heard(SCloud):
    """The oracle, and its last answer, for who keeps the books here."""

    def judge(self, panels: Tensor, condition: Tensor | None = None) -> Tensor:
        self.last = super().judge(panels, condition)
        return self.last


@dataclass(frozen=True)
class Args:
    """Compare HIL-DD's toy and learned-reward on HIL-DD's checkpoint.

    Args:
        source: The published file, rectified_model_ckp1.pt.
        seeds: How many seeds, from 0.
        first: The first seed.
        agents: Which agents.
        steps: Equal Euler steps from noise to cloud; the toy takes 100.
        times: Times at which hil-dd takes residuals; the toy takes 100.
        data: Real clouds of its barrier; the toy takes 256.
        out: Folder of the results.
    """

    source: Annotated[Path, tyro.conf.Positional]
    seeds: int = 5
    first: int = 0
    agents: tuple[str, ...] = tuple(AGENTS)
    steps: int = 20
    times: int = 20
    data: int = 64
    out: Path = RESULTS


def measure(task: Any, samples: Tensor) -> dict[str, float]:
    """Share of S curves, median Chamfer distance to the nearer curve, and in units of the data's own there."""
    data, kind = task.data(64, make_generator(2, stream="clouds"))
    own = torch.stack([task.residuals(data[kind == k])[:, k].median() for k in (ROLL, S_CURVE)])
    residual, nearer = task.residuals(samples).min(1)
    return {
        "s_rate": float((nearer == S_CURVE).double().mean()),
        "residual": float(residual.median()),
        "ratio": float((residual / own[nearer]).median()),
    }


def course(args: Args, name: str, seed: int, noise: Tensor) -> tuple[list[dict[str, Any]], Tensor]:
    """One agent and seed: a row for the start and each informative panel, and its last samples."""
    task: Any = make_task(TASK)
    flow: Any = task.flow()
    flow.field.field.load_state_dict(read_hil_dd(args.source))
    oracle = Heard(task, "choose")
    env = FlowVectorEnv(
        4, task=task, oracle=oracle, reference=flow, panel_size=4, steps=args.steps, device="cpu"
    )
    config = agent_config(AGENTS[name].format(times=args.times, data=args.data))
    agent = make_agent(name, env, config=config, seed=seed)
    samples = agent.sample(noise)
    known = {"agent": name, "seed": seed}
    rows = [{**known, "informative": 0, "panels": 0, **measure(task, samples)}]

    def after(agent: Any, metrics: dict[str, float]) -> bool:
        nonlocal samples
        if 0 < float(oracle.last.sum()) < 4:
            samples = agent.sample(noise)
            counts = {"informative": len(rows), "panels": agent.rounds}
            rows.append({**known, **counts, **measure(task, samples)})
        return len(rows) <= PANELS

    agent.learn(4000, callback=after)
    return rows, samples


def table(rows: list[dict[str, Any]], agents: tuple[str, ...]) -> list[str]:
    """A Markdown line an agent and panel: median and range over the seeds."""
    lines = [
        "| agent | informative panels | share of S curves | Chamfer residual | / the data's own | panels shown |",
        "|---" * 6 + "|",
    ]
    for name in agents:
        for k in range(PANELS + 1):
            mine = [r for r in rows if r["agent"] == name and r["informative"] == k]
            cells = []
            for key, digits in (("s_rate", 2), ("residual", 3), ("ratio", 2), ("panels", 0)):
                values = [r[key] for r in mine]
                low, middle, high = min(values), statistics.median(values), max(values)
                cells.append(f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})")
            lines.append(f"| `{name}` | {k} | {' | '.join(cells)} |")
    return lines


def main(args: Args) -> None:
    """Run, and write the results."""
    task: Any = make_task(TASK)
    noise = torch.randn(48, *task.event_shape, generator=make_generator(1, stream="clouds"))
    rows: list[dict[str, Any]] = []
    drawn: dict[str, Tensor] = {}
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "clouds.jsonl"
    log.unlink(missing_ok=True)
    seeds = range(args.first, args.first + args.seeds)
    for seed, name in tqdm([(s, n) for s in seeds for n in args.agents], unit="run"):
        new, samples = course(args, name, seed, noise)
        rows += new
        drawn.setdefault(name, samples)
        with log.open("a") as file:
            file.writelines(json.dumps(r) + "\n" for r in new)
    lines = [
        "# HIL-DD's toy on its own checkpoint, and `learned-reward` on the same",
        "",
        f"`python -m benchmarks.clouds rectified_model_ckp1.pt`, seeds {args.first} to {seeds[-1]}; noise of "
        f"standard deviation {task.noise}, {args.steps} Euler steps, {args.times} times and {args.data} real "
        "clouds in `hil-dd`'s update. Median (range) on 48 fixed noises. Settings: "
        + "; ".join(f"`{AGENTS[n].format(times=args.times, data=args.data)}`" for n in args.agents)
        + ".",
        "",
        *table(rows, args.agents),
        "",
        "![model A, and both after three informative panels, same noises](clouds.png)",
    ]
    text = keep(args.out, "clouds", lines)
    flow: Any = task.flow()
    flow.field.field.load_state_dict(read_hil_dd(args.source))
    env = FlowVectorEnv(4, task=task, reference=flow, panel_size=4, steps=args.steps, device="cpu")
    groups = [env.policy(flow).sample(noise[:12]), *(drawn[n][:12] for n in drawn)]
    colors = [plotting.RED, *[plotting.GREEN] * len(drawn)]
    figure = plotting.sheet(task, [g.numpy() for g in groups], colors, ["model A", *drawn])
    figure.savefig(args.out / "clouds.png")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
