"""HIL-DD's toy on its own published checkpoint: its update, and ours, after 1, 2 and 3 informative panels.

    python -m benchmarks.clouds rectified_model_ckp1.pt        the toy's own settings, some 3 minutes a run
    python -m benchmarks.clouds rectified_model_ckp1.pt --steps 20 --times 20 --data 128       five times coarser

Both start from the same network (``prefenv import-hil-dd``), show panels of four and are told which are S curves;
a panel is informative if some are and some are not. ``hil-dd`` learns as the toy does: residuals at 100 times,
256 real clouds, one Adam step of 1e-3 a panel, and the toy's noises (``Toy``). ``hil-dd, one noise`` takes noise
of 0.28 for real clouds too, as our agent does. ``learned-reward`` chooses what it asks from its own samples.
Measured on 48 fixed noises, twelve screens of four: share of S curves, and mean Chamfer distance to the nearer
curve (half the sum of there and back), also in units of real clouds' own. Runs that have rows are not repeated.
Writes ``clouds.jsonl`` (a line a run and panel), ``clouds.md`` and ``clouds.png`` to ``benchmarks/results/``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from agents.hil_dd import HilDD
from benchmarks.pages import keep, spread
from oracles.s_cloud import SCloud
from prefenv import plotting
from prefenv.device import make_generator
from prefenv.envs import FlowVectorEnv
from prefenv.hil_dd import TASK, read_hil_dd
from prefenv.policy import FlowPolicy
from prefenv.registry import make_agent, make_task
from prefenv.rollout import Rollout, collect
from prefenv.tasks.clouds import ROLL, S_CURVE, scale_to_range

RESULTS = Path(__file__).parent / "results"
_TOY = "lr=1e-3,updates=1,horizon=1.0,times={times},data_batch={data}"
AGENTS = {
    "hil-dd": f"benchmarks.clouds:Toy:{_TOY}",
    "hil-dd, one noise": f"hil-dd:{_TOY}",
    "learned-reward": "learned-reward:pool=192,effective=32,growth=1,anchors=48,updates=40,batch=16",
}
PANELS = 3
SCREENS = 12
# Share of S curves after 0, 1, 2, 3 informative panels that the toy's own code was measured at, by seed.
ORIGINAL = {0: (0.06, 0.29, 0.46, 0.65), 1: (0.125, 0.27, 0.31, 0.48)}
ABOUT = """\
# HIL-DD's toy on its own checkpoint, and `learned-reward` on the same

**The original.** Its own code, with somebody who chooses every S curve, was measured on this checkpoint: on 48
fixed noises the share of S curves went {courses} over three informative panels (two seeds; the first went on
to 0.83, 0.83, 0.77), while the Chamfer residual rose from 0.034 to 0.082 (the second seed), in a normalisation
that was not noted.

**Ours at the toy's settings** (the first table, five seeds) takes the same course: medians 0.38, 0.56 and
0.69. The original's first seed lies within the range of ours after one and three panels and just below it
after two (0.46 where ours begins at 0.48); its second lies within it after one (0.27) and below it after two
and three. So ours may be somewhat the faster, which two seeds of the original cannot tell. What still differs
from the toy's code: random draws; its `int(100 t)` falls one short at 2 of 100 sampling and 11 of 100 learning
times; an S curve is chosen if it is a clean one (the `s-cloud` oracle; on three seeds, choosing by the nearer
curve made no difference); a panel of four S curves teaches nothing.

**Side by side**, `learned-reward` makes more S curves after one informative panel (0.90, in four seeds of five
above 0.8) than `hil-dd` after three (0.69), and in units of the data's own distance they are cleaner after
each of the three panels by the median (1.73, 1.64, 1.58 against 1.98, 1.93, 1.64; after three the ranges
overlap). Plain distances are larger for whoever makes more S curves, whose own are twice the rolls'. `hil-dd`
learns from 256 real clouds at every panel, `learned-reward` from none; it chooses its panels from 192 samples
of its own, which is what it costs: network evaluations, not questions.

**A fifth of the steps and times** (the second table) gives `hil-dd` the same course at a fifth of the cost.

**One noise for all.** The toy scales each batch of noise to [-1, 1], which leaves a standard deviation of 0.28
for a screen of four and 0.22 for 256 real clouds. `hil-dd, one noise` takes 0.28 for the real clouds too (and
stratified times). There the network makes one S curve in ten while half of the real clouds are S curves, so
that the flow loss itself brings S curves: 0.94 after three panels, beyond the range of the toy's noises, and
cleaner ones.
"""
PICTURE = "model A, and both after three informative panels, same noises"


def screens(task: Any, n: int, size: int, generator: torch.Generator) -> Tensor:
    """Noises of ``n`` batches of ``size`` clouds, each batch scaled to [-1, 1] as one, as the toy does.

    In the task's units: ``(n * size, P, 2)``, of standard deviation near 1 for batches of four and 0.8 for 256.
    """
    z = torch.randn(n, size, *task.event_shape, generator=generator)
    return scale_to_range(z, dims=3).flatten(0, 1) / task.noise


class Toy(HilDD):
    """``hil-dd`` with the toy's own draws: noises scaled to [-1, 1] a batch at a time, times drawn one by one.

    Screens of four thus start from a standard deviation of 0.28, and the 256 real clouds of the barrier from 0.22,
    near the 0.23 that the network was trained from.
    """

    name = "hil-dd"

    def ask(self, pending: Any = ()) -> Rollout:
        noise = screens(self.env.task, 1, self.env.num_envs, self.generator)
        return collect(self.env, self.behaviour(), noise=noise)

    def noise_like(self, x: Tensor) -> Tensor:
        return screens(self.env.task, 1, len(x), self.generator)

    def times_of(self, x: Tensor) -> Tensor:
        return torch.rand(len(x), generator=self.generator, device=self.device)


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
        steps: Equal Euler steps from noise to cloud.
        times: Times at which hil-dd takes residuals.
        data: Real clouds of its barrier.
        out: Folder of the results.
    """

    source: Annotated[Path, tyro.conf.Positional]
    seeds: int = 5
    first: int = 0
    agents: tuple[str, ...] = tuple(AGENTS)
    steps: int = 100
    times: int = 100
    data: int = 256
    out: Path = RESULTS


def measure(task: Any, samples: Tensor) -> dict[str, float]:
    """Share of S curves; Chamfer distance to the nearer curve, and in units of the data's own there."""
    data, kind = task.data(64, make_generator(2, stream="clouds"))
    own = torch.stack([task.residuals(data[kind == k])[:, k].median() for k in (ROLL, S_CURVE)])
    residual, nearer = task.residuals(samples).min(1)
    return {
        "s_rate": float((nearer == S_CURVE).double().mean()),
        "residual": float(residual.mean()),
        "rms": float(task.residuals(samples, 2).amin(1).mean().sqrt()),
        "ratio": float((residual / own[nearer]).median()),
    }


def reference(task: Any, source: Path) -> Any:
    """The published network as a flow of the task."""
    flow = task.flow()
    flow.field.field.load_state_dict(read_hil_dd(source))
    return flow


def course(args: Args, name: str, seed: int) -> tuple[list[dict[str, Any]], Tensor]:
    """One agent and seed: a row for the start and each informative panel, and its last samples."""
    task: Any = make_task(TASK)
    oracle = Heard(task, "choose")
    env = FlowVectorEnv(
        4,
        task=task,
        oracle=oracle,
        reference=reference(task, args.source),
        panel_size=4,
        steps=args.steps,
        device="cpu",
    )
    noise = screens(task, SCREENS, 4, make_generator(seed, stream="screens"))
    agent = make_agent(AGENTS[name].format(times=args.times, data=args.data), env, seed=seed)
    samples = agent.sample(noise)
    sizes = {"steps": args.steps, "times": args.times, "data": args.data}
    known = {"agent": name, "seed": seed, **sizes}
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
            digits = {"s_rate": 2, "residual": 3, "ratio": 2, "panels": 0}
            cells = [spread([r[key] for r in mine], d) for key, d in digits.items()]
            lines.append(f"| `{name}` | {k} | {' | '.join(cells)} |")
    return lines


def page(rows: list[dict[str, Any]]) -> list[str]:
    """A section for each number of steps, the most first."""
    lines = []
    for steps in sorted({r["steps"] for r in rows}, reverse=True):
        mine = [r for r in rows if r["steps"] == steps]
        agents = tuple(name for name in AGENTS if name in {r["agent"] for r in mine})
        seeds = "; ".join(
            f"`{n}` seeds {sorted({r['seed'] for r in mine if r['agent'] == n})}" for n in agents
        )
        size = f"{steps} Euler steps, residuals at {mine[0]['times']} times, {mine[0]['data']} real clouds"
        lines += [f"## {size}", "", *table(mine, agents), "", f"Median (range): {seeds}.", ""]
    return lines


def main(args: Args) -> None:
    """Run what has no row yet, and write the results."""
    args.out.mkdir(parents=True, exist_ok=True)
    log, picture = args.out / "clouds.jsonl", args.out / "clouds.png"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    drawn: dict[str, Tensor] = {}
    seeds = range(args.first, args.first + args.seeds)
    known = {(r["agent"], r["seed"], r["steps"]) for r in rows}
    todo = [(s, n) for s in seeds for n in args.agents if (n, s, args.steps) not in known]
    for seed, name in tqdm(todo, unit="run"):
        new, samples = course(args, name, seed)
        rows += new
        drawn.setdefault(name, samples)
        with log.open("a") as file:
            file.writelines(json.dumps(r) + "\n" for r in new)
    settings = "; ".join(f"`{AGENTS[n]}`" for n in AGENTS)
    told = " and ".join(", ".join(f"{v:.2f}" for v in x) for x in ORIGINAL.values())
    lines = [
        ABOUT.format(courses=told),
        *page(rows),
        f"Settings: {settings}.",
        "",
        f"![{PICTURE}](clouds.png)",
    ]
    print(keep(args.out, "clouds", lines))
    if len(drawn) == len(AGENTS):
        draw(args, drawn).savefig(picture)


def draw(args: Args, drawn: dict[str, Tensor]) -> Any:
    """Model A and what the agents make of the same noises, twelve of the first seed's."""
    task: Any = make_task(TASK)
    flow = reference(task, args.source)
    noise = screens(task, SCREENS, 4, make_generator(args.first, stream="screens"))[:12]
    made = FlowPolicy(flow, steps=args.steps, shift=task.shift).sample(noise)
    groups = [made, *(x[:12] for x in drawn.values())]
    colors = [plotting.RED, *[plotting.GREEN] * len(drawn)]
    return plotting.sheet(task, [g.numpy() for g in groups], colors, ["model A", *drawn])


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
