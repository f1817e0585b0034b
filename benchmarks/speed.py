"""Speed, as ratios measured in one run: ``make speed``, or ``python -m benchmarks.speed [--quick]``.

Cases are taken in turns on one thread, and a ratio is the median over the rounds, the range beside it; on a CPU
the time is the process's own. The full run prints its table and keeps it in ``benchmarks/results/speed.md`` and
``speed.json``; ``--quick`` tries everything small, has no goals, and keeps nothing unless ``--out`` says where.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import speed_memory
from benchmarks.speed_rollout import against_bare_loop, against_sync_vector_env, as_one_graph
from benchmarks.speed_timing import Found, Row
from benchmarks.speed_training import against_sb3, reference_training

RESULTS = Path(__file__).parent / "results"

NOTES = """\
What is compared:

- **Bare loop**: `x = x + (u - t) * net(x, torch.full((B,), t))` under `inference_mode`, noise drawn too:
  what a library's user writes. The env draws noises, checks and clips every action, judges the finished
  samples with its default oracle and starts the next episode. What pays for that: the time embedding is
  computed once for all rows and kept, and weights are stored as (in, out). Anyone may do the same without
  an env: `reference.sample, no env` is that, and `bare loop, one t for all rows` is half of it. These two,
  and `collect`, which does more than the bare loop, have no goal.
- **SyncVectorEnv**: SAME_STEP autoreset. In a whole rollout the generator acts for all rows at once on both
  sides; its time is the same for both and caps the ratio.
- **Stable-Baselines3**: its own `collect_rollouts` and `train` with a batched `VecEnv`
  (`prefenv/sb3.py`), not `DummyVecEnv`. The same: network, kernel (stochastic at every step),
  transitions, minibatches, epochs, gradient clipping, a learning rate of 0, `anchor=0`. Different: SB3 has
  a value network (129-64-1) with its loss, its Adam is not fused unless said, its env speaks numpy through
  Gymnasium's face, and it evaluates the network with one t a row. Our `collect` goes to the env's core,
  embeds the time once for all rows, and has no value network.
- **Reference training**: `train_reference` itself (AdamW fused, average of the weights by `_foreach_lerp_`,
  stratified times) against a loop with default Adam, the average in a Python loop, and times by
  `torch.rand`. The same: network, batch, data, gradient clipping, schedule. The ratio is of times, so less
  is better.
- **Memory**: `VmHWM` of a fresh process for each line; `above imports` is what the env and its rollout
  took. `collect` keeps the whole path, `env` and `bare` keep nothing.
"""


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Args:
        rollouts: Rows, the goal there, and rounds.
        sync: Rows and rounds.
        sb3: Rows, minibatch, epochs and rounds.
        training: Steps of a round, and rounds.
        graph: Rows and rounds.
        memory: Case and rows.
    """

    rollouts: tuple[tuple[int, float, int], ...]
    sync: tuple[int, int]
    sb3: tuple[tuple[int, int, int, int], ...]
    training: tuple[int, int]
    graph: tuple[tuple[int, int], ...]
    memory: tuple[tuple[str, int], ...]


FULL = Size(
    rollouts=((1024, 1.0, 25), (64, 0.9, 150)),
    sync=(256, 8),
    sb3=((256, 1024, 4, 8), (64, 256, 4, 20)),
    training=(20, 12),
    graph=((1024, 50), (64, 50)),
    memory=tuple((case, rows) for rows in (1024, 16384) for case in ("bare", "env", "collect")),
)
QUICK = Size(
    rollouts=((64, 0.9, 5),),
    sync=(4, 2),
    sb3=((4, 32, 1, 2),),
    training=(2, 2),
    graph=((64, 3),),
    memory=(("env", 64),),
)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"measuring: {text}", file=sys.stderr, flush=True)


def measure(size: Size, device: str) -> tuple[Found, list[dict[str, Any]]]:
    """All sections on one device, and the peak memories."""
    found = Found()
    for rows, goal, rounds in size.rollouts:
        say(f"rollouts of {rows} rows on {device}")
        found.add(against_bare_loop(rows, goal, rounds, device))
    say(f"SyncVectorEnv on {device}")
    found.add(against_sync_vector_env(*size.sync, device))
    for settings in size.sb3:
        say(f"Stable-Baselines3, {settings[0]} rows on {device}")
        found.add(against_sb3(*settings, device))
    say(f"reference training on {device}")
    found.add(reference_training(*size.training, device))
    for rows, rounds in size.graph if device == "cuda" else ():
        say(f"a rollout of {rows} rows as one graph")
        found.add(as_one_graph(rows, rounds))
    memory = []
    for case, rows in size.memory:
        say(f"memory of {case}, {rows} rows on {device}")
        memory.append(speed_memory.measure(case, rows, device))
    return found, memory


def machine() -> str:
    """The machine in one line."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file() and (
        name := re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE)
    ):
        cpu = name[1]
    load = f", load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "; no GPU"
    return f"{cpu}, {os.cpu_count()} cores shared with other jobs, 1 thread used{load}{gpu}"


def versions() -> str:
    """The versions that matter, in one line."""
    names = ["torch", "numpy", "gymnasium", "stable-baselines3", "prefenv"]
    return ", ".join([f"Python {platform.python_version()}", *(f"{n} {version(n)}" for n in names)])


def table(found: Found, memory: list[dict[str, Any]], header: dict[str, str]) -> str:
    """Everything as Markdown."""
    lines = ["# Speed", "", *(f"- {name}: {value}" for name, value in header.items()), ""]
    for section in dict.fromkeys(row.section for row in found.rows):
        rows = [row for row in found.rows if row.section == section]
        lines += [f"## {section}", ""]
        lines += ["| ours | against | goal | ratio | range | met | ours, ms | theirs, ms |"]
        lines += ["|---|---|---|---|---|---|---|---|", *map(line, rows), ""]
    lines += [
        "## Peak memory, MiB",
        "",
        "| rollout | rows | device | imports | peak | above imports | GPU |",
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    lines += [
        f"| {m['case']} | {m['rows']:,} | {m['device']} | {m['imports']:.0f} | {m['peak']:.0f} | "
        f"{m['peak'] - m['imports']:.0f} | {m['cuda'] or '–'} |"
        for m in memory
    ]
    lines += [
        "",
        "## What must hold",
        "",
        "| what | value | at most | holds |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {f.what} | {f.value:.2g} | {f.most:g} | {'yes' if f.holds else '**NO**'} |"
        for f in found.facts
    ]
    return "\n".join([*lines, "", NOTES])


def line(row: Row) -> str:
    """A comparison as a line of its table."""
    goal, met = "–", {None: "–", True: "met", False: "**missed**"}[row.met]
    if row.goal is not None:
        goal = f"≥ {row.goal:g}x" if row.unit == "throughput" else f"≤ {row.goal:g}x its time"
    low, high = min(row.ratios), max(row.ratios)
    ours, base = (1e3 * median(s) for s in zip(*row.seconds, strict=True))
    return (
        f"| {row.ours} | {row.base} | {goal} | {median(row.ratios):.2f} | {low:.2f} to {high:.2f} | {met} | "
        f"{ours:.1f} | {base:.1f} |"
    )


def as_dict(row: Row) -> dict[str, Any]:
    """A comparison for the JSON file."""
    ratios = row.ratios
    return {
        **{k: getattr(row, k) for k in ("section", "ours", "base", "unit", "goal", "met")},
        "ratio": median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "rounds": len(ratios),
        "seconds": [median(s) for s in zip(*row.seconds, strict=True)],
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, keep it. Returns 1 if something that must hold does not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="everything small, in some 20 seconds")
    parser.add_argument("--out", type=Path, help="folder for speed.md and speed.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found, memory = Found(), []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        more, held = measure(QUICK if args.quick else FULL, device)
        found.add(more)
        memory += held
    if args.quick:  # too small to be held against the goals
        for row in found.rows:
            row.goal = None
    given = sys.argv[1:] if argv is None else argv
    header = {
        "Command": f"`{shlex.join(['python', '-m', 'benchmarks.speed', *given])}`",
        "Date": datetime.date.today().isoformat(),
        "Machine": machine(),
        "Versions": versions(),
    }
    text = table(found, memory, header)
    print(text)
    out = args.out or (None if args.quick else RESULTS)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        kept = {
            **{name.lower(): value for name, value in header.items()},
            "rows": [as_dict(row) for row in found.rows],
            "facts": [{**vars(fact), "holds": fact.holds} for fact in found.facts],
            "memory": memory,
        }
        (out / "speed.md").write_text(text, encoding="utf-8")
        (out / "speed.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return 0 if all(fact.holds for fact in found.facts) else 1


if __name__ == "__main__":
    sys.exit(main())
