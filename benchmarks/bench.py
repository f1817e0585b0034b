"""``prefenv bench``: agents x experiments x seeds, as a list of runs that can be stopped and goes on.

A line of ``<out>/<experiment>.jsonl`` is a finished run. What has a line is not run again: a run is known by a
hash of all its settings, the agent's defaults among them. Runs that failed are tried again, with ``--again`` all.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table

from benchmarks.engines import ENGINES
from benchmarks.experiments import NAMES, load, on_task, question
from benchmarks.jobs import Job, jobs, judge_of, work
from prefenv.checkpoints import write_atomic
from prefenv.cli_bench import Bench
from prefenv.errors import ConfigError, RunError
from prefenv.registry import agent_config, names
from prefenv.runs import writable

Line = dict[str, Any]
QUICK = ("basic", "few", "pairs")
_KNOWN_BY = {"experiment", "variant", "agent", "seed", "name"}  # what every row says


def bench(args: Bench) -> int:
    """Run what is missing, and say what was done; 1 if runs failed."""
    wanted = list(jobs_of(args))
    writable(args.out)
    results = Results(args.out)
    folder = (args.work or args.out / "work").absolute()
    counts = run_all(wanted, results, args.engine, args.workers, folder, args.again)
    results.tidy(wanted)
    results.add_frontiers({job.experiment for job in wanted})
    if args.json:
        print(json.dumps({"out": str(args.out), **counts}))
        return int(counts["failed"] > 0)
    print(
        f"{counts['done']} runs done, {counts['refused']} refused by their agents, {counts['failed']} "
        f"failed, {counts['skipped']} were there before; results in {args.out}"
    )
    for line in results.lines():
        if "error" in line:
            print(f"failed: {line['experiment']} {line['name']}: {line['error']}")
    task = f" --task {args.task}" if args.task else ""
    print(f"next: prefenv report --results {args.out}{task}")
    return int(counts["failed"] > 0)


def jobs_of(args: Bench) -> Iterator[Job]:
    """All runs that are asked for, each once.

    Raises:
        UnknownNameError: An agent, an experiment or a task that is not known.
        ConfigError: An experiment that cannot be run on the task, or a number that is too small.
    """
    for option, value, least in (
        ("--seeds", args.seeds, 1),
        ("--first-seed", args.first_seed, 0),
        ("--workers", args.workers, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{option} {value} is too small; give a number from {least}")
    agents = dict.fromkeys(args.agents or names("agent"))
    for agent in agents:
        agent_config(agent)
    usual = QUICK if args.suite == "quick" else NAMES
    chosen = dict.fromkeys(on_task(name, args.task) for name in args.experiments or usual)
    for name in chosen:
        load(name)
    seeds = args.seeds or (3 if args.suite == "quick" else None)
    return jobs(chosen, agents, seeds, args.first_seed)


@dataclass
class Results:
    """Lines of finished runs, a file an experiment.

    Args:
        folder: Where they are.

    Raises:
        RunError: A file is damaged.
    """

    folder: Path
    _lines: dict[str, list[Line]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in sorted(self.folder.glob("*.jsonl")):
            self._lines[path.stem] = _read(path)
        _frontiers(self.folder)  # now, and not when hours of runs are done

    def lines(self) -> list[Line]:
        """All of them."""
        return [line for lines in self._lines.values() for line in lines]

    def finished(self) -> set[tuple[str, str, str]]:
        """Experiment, variant and name of the runs that came to an end."""
        return {
            (x["experiment"], x["variant"], x["name"]) for x in self.lines() if "error" not in x
        }

    def add(self, line: Line) -> None:
        """Keep a line, at once."""
        lines = self._lines.setdefault(line["experiment"], [])
        lines.append(line)
        with (self.folder / f"{line['experiment']}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def tidy(self, wanted: Iterable[Job]) -> None:
        """Sort the lines; of runs that were done again, or with other settings, keep the last line.

        Variants that the experiment has no more come last.
        """
        touched = {job.experiment for job in wanted}
        for name in touched & self._lines.keys():
            path = self.folder / f"{name}.jsonl"
            lines = _read(path)  # not ours alone: another bench may have written there
            last = {(x["variant"], x["agent"], x["seed"]): x for x in lines}
            order = [*load(name).variants, *sorted({x["variant"] for x in lines})]
            kept = sorted(
                last.values(), key=lambda x: (order.index(x["variant"]), x["agent"], x["seed"])
            )
            self._lines[name] = kept
            write_atomic(path, "".join(json.dumps(x) + "\n" for x in kept).encode())

    def add_frontiers(self, experiments: Iterable[str]) -> None:
        """Keep each experiment's frontier (of its first variant) beside the lines, for the report."""
        for name in sorted(set(experiments) - _frontiers(self.folder).keys()):
            judge = judge_of(name, next(iter(load(name).variants)))
            reward, kl, stderr = judge.frontier_curve(100)
            frontier = {
                "reward": np.round(reward, 5).tolist(),
                "reward_stderr": np.round(stderr, 6).tolist(),
                "kl": np.round(kl, 5).tolist(),
                "reference_reward": float(judge.rewards.double().mean()),
                "optimum_reward": judge.optimum_reward,
                "optimum_kl": judge.optimum_kl,
            }
            found = {**_frontiers(self.folder), name: frontier}
            write_atomic(self.folder / "frontier.json", json.dumps(found).encode())


def _read(path: Path) -> list[Line]:
    """Its lines; a last one that a kill cut short is taken out of the file.

    Raises:
        RunError: Another is not the row of a run.
    """
    *lines, last = path.read_bytes().split(b"\n")
    if _json(last) is not None:  # all there but for its newline
        lines.append(last)
    rows = [_json(line) for line in lines]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not row.keys() >= _KNOWN_BY:
            raise RunError(
                f"{path}, line {number}: this is not the row of a run; mend or remove it"
            )
    if last:
        write_atomic(path, b"".join(line + b"\n" for line in lines))
    return rows


def _frontiers(folder: Path) -> dict[str, Any]:
    """The frontiers that are known, by experiment.

    Raises:
        RunError: The file is damaged.
    """
    path = folder / "frontier.json"
    found = _json(path.read_bytes()) if path.exists() else {}
    if not isinstance(found, dict):
        raise RunError(f"{path}: these are no frontiers; remove it, and it is made again")
    return found


def _json(text: bytes) -> Any:
    """What it says, or None where it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def run_all(
    wanted: list[Job],
    results: Results,
    engine: str,
    workers: int | None,
    folder: Path,
    again: bool = False,
) -> dict[str, int]:
    """Do the runs that have no line yet, or all of them again, and keep their lines as they come.

    Returns:
        How many were ``done``, ``refused``, ``failed``, and ``skipped``.
    """
    finished = set() if again else results.finished()
    todo = [j for j in wanted if (j.experiment, j.variant, j.config.name) not in finished]
    counts = {"done": 0, "refused": 0, "failed": 0, "skipped": len(wanted) - len(todo)}
    if not todo:
        return counts
    board = Board(wanted, todo)
    with board.shown():
        what = functools.partial(work, folder=folder, again=again)
        for job, line in ENGINES[engine](what, todo, workers):
            if line is None:
                board.begin(job)
                continue
            results.add(line)
            outcome = next((o for k, o in _OUTCOMES.items() if k in line), "done")
            counts[outcome] += 1
            board.end(job, outcome, line)
    return counts


_OUTCOMES = {"error": "failed", "refused": "refused"}


class Board:
    """The live table: what is done, what runs, what failed, and how long it will take.

    Args:
        wanted: All runs.
        todo: Those that are left.
    """

    def __init__(self, wanted: list[Job], todo: list[Job]):
        self.total, self.left = Counter(j.experiment for j in wanted), len(todo)
        missing = Counter(j.experiment for j in todo)
        self.counts = {name: Counter(done=n - missing[name]) for name, n in self.total.items()}
        self.running: dict[Job, float] = {}
        self.began, self.ended = time.monotonic(), 0
        self.console = Console(stderr=True)
        self.live: Live | None = None

    @contextlib.contextmanager
    def shown(self) -> Generator[None]:
        """Show it for the time of a ``with``; where there is no terminal, a line a run is printed instead."""
        if not self.console.is_terminal:
            yield
            return
        with Live(get_renderable=self.table, console=self.console, refresh_per_second=2) as live:
            self.live = live
            yield

    def begin(self, job: Job) -> None:
        """A run begins."""
        self.running[job] = time.monotonic()

    def end(self, job: Job, outcome: str, line: Line) -> None:
        """A run ended."""
        seconds = time.monotonic() - self.running.pop(job)
        self.counts[job.experiment][outcome] += 1
        self.left, self.ended = self.left - 1, self.ended + 1
        told = line.get("error") or line.get("refused") or f"score {line['score']:.3f}"
        if self.live is None or outcome == "failed":
            variant = f" {job.variant}" if job.variant else ""
            self.console.print(
                f"{job.experiment}{variant} {job.agent} seed {job.seed}: {told} ({seconds:.0f} s, "
                f"{self.left} left, {self.time_left()})",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )

    def time_left(self) -> str:
        """By the pace so far."""
        if not self.ended:
            return "time left: not known yet"
        minutes, seconds = divmod(
            round((time.monotonic() - self.began) / self.ended * self.left), 60
        )
        hours, minutes = divmod(minutes, 60)
        return f"about {hours}:{minutes:02}:{seconds:02} left"

    def table(self) -> Table:
        """The table as it is now."""
        table = Table(title=f"prefenv bench: {self.left} runs left, {self.time_left()}")
        for head in ("experiment", "question"):
            table.add_column(head, no_wrap=head == "experiment")
        for head in ("runs", "done", "running", "refused", "failed"):
            table.add_column(head, justify="right")
        now = Counter(j.experiment for j in self.running)
        for name, total in self.total.items():
            count = self.counts[name]
            failed = f"[red]{count['failed']}[/red]" if count["failed"] else "0"
            cells = (total, count["done"], now[name], count["refused"])
            table.add_row(name, question(name), *map(str, cells), failed)
        names = ", ".join(f"{j.agent} s{j.seed}" for j in self.running)
        table.caption = f"running: {names}" if names else None
        return table


def main(argv: list[str] | None = None) -> int:
    """``python -m benchmarks.bench``: the same as ``prefenv bench``."""
    from prefenv.cli import main as cli

    return cli(["bench", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
