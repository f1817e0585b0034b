"""One run of a benchmark: from an experiment, an agent and a seed to a line of the results."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import platform
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiments import load
from prefenv.agent import Agent
from prefenv.checkpoints import write_atomic
from prefenv.errors import RequiresError
from prefenv.evaluation import Judge, made
from prefenv.oracle import ScriptedOracle, scored
from prefenv.registry import make_oracle
from prefenv.runs import RunConfig, align, versions
from prefenv.tasks.conditions import rows_of

LOOKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of the budget: where the curve is taken
KEPT = (
    "score", "optimum_score", "beta", "preferred_rate", "reference_preferred_rate", "reward", "kl_nats",
    "kl_stderr", "kl_bound_nats", "frontier_kl_nats", "residual", "reference_residual", "diversity",
    "optimum_effective_size", "panels", "queries", "gradients", "nfe", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        experiment: Its experiment, by name.
        variant: Label of the experiment's variant.
        agent: Agent, by name; settings may follow.
        seed: Seed of everything random.
    """

    experiment: str
    variant: str
    agent: str
    seed: int

    @property
    def config(self) -> RunConfig:
        """What is run; its name hashes all settings, the agent's defaults among them."""
        return load(self.experiment).config(self.variant, self.agent, self.seed)

    @property
    def command(self) -> str:
        """The command that makes its line again."""
        return (
            f"prefenv bench --experiments {self.experiment} --agents {self.agent} "
            f"--first-seed {self.seed} --seeds 1"
        )

    def head(self) -> dict[str, Any]:
        """What every line begins with."""
        return {
            "experiment": self.experiment,
            "variant": self.variant,
            "agent": self.agent,
            "seed": self.seed,
            "name": self.config.name,
            "command": self.command,
            "code": code(),
            "versions": versions(),
            "machine": machine(),
        }


def jobs(
    experiments: Iterable[str], agents: Iterable[str], seeds: int | None, first: int = 0
) -> Iterator[Job]:
    """All runs, an experiment and a variant after the other, whole seeds first.

    Args:
        experiments: By name.
        agents: By name.
        seeds: Of each; None = the experiment's own number.
        first: The first seed.
    """
    agents = list(agents)
    for name in experiments:
        experiment = load(name)
        for variant in experiment.variants:
            for seed in range(first, first + (seeds or experiment.seeds)):
                yield from (Job(name, variant, agent, seed) for agent in agents)


@functools.cache
def code() -> str:
    """Which code computed it: a digest of our packages' sources, as they lie where they are imported from.

    Told, and no more: a run's name does not change with it.
    """
    digest = hashlib.sha256()
    for package in ("agents", "benchmarks", "oracles", "prefenv"):
        (root,) = map(Path, importlib.import_module(package).__path__)
        for path in sorted(root.rglob("*.py"), key=Path.as_posix):
            name, text = path.relative_to(root.parent).as_posix(), path.read_text("utf-8")
            digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()[:12]


@functools.cache
def machine() -> str:
    """What computed it, in words."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = found[0].partition(":")[2].strip() if found else model
    return f"{model}, one thread a run"


@functools.lru_cache(maxsize=2)  # jobs come an experiment and a variant after the other
def judge_of(experiment: str, variant: str) -> Judge:
    """What scores a variant's runs, made once a process."""
    return load(experiment).judge(variant)


def work(job: Job, folder: Path, again: bool = False) -> dict[str, Any]:
    """Do a run in its directory below ``folder``; a killed one goes on where it stopped.

    Args:
        job: What to run.
        folder: Where the runs' directories are.
        again: Empty its directory first.

    Returns:
        Its line: numbers, or ``refused`` (by design), or ``error``.
    """
    torch.set_num_threads(1)
    try:
        home = folder / job.experiment / job.config.name
        if again and home.exists():
            shutil.rmtree(home)
        return {**job.head(), **_measure(job, home)}
    except RequiresError as error:  # by design: it needs gradients, say
        return {**job.head(), "refused": str(error)}
    except Exception as error:  # one crash is a result, and not the end of the others
        return {**job.head(), "error": " ".join(f"{type(error).__name__}: {error}".split())}


def few(judge: Judge, n: int = 512) -> torch.Tensor:
    """Indices of about ``n`` of the judge's noises, as many of each condition."""
    count = 1 if judge.conditions is None else len(judge.conditions)
    rows = torch.arange(len(judge.noise))
    return rows[rows % (len(rows) // count) < n // count]


def _measure(job: Job, folder: Path) -> dict[str, Any]:
    """Run, or read what was run, and look at the model on the way."""
    config, judge = job.config, judge_of(job.experiment, job.variant)
    notes = folder / "curve.json"
    curve: list[list[float | None]] = json.loads(notes.read_text()) if notes.exists() else []
    proxy = make_oracle(config.oracle, judge.task)
    spent = float(curve[-1][1] or 0.0) if curve else 0.0
    began, looking = time.process_time(), 0.0
    marks = [config.queries * share for share in LOOKS]
    rows = few(judge)
    asked = rows_of(judge.asked(judge.noise_label), rows)

    def look(agent: Agent, _: dict[str, float]) -> None:
        nonlocal looking
        queries = agent.env.ledger.queries
        seen = sum(mark <= (curve[-1][0] or 0) for mark in marks) if curve else 0
        if sum(mark <= queries for mark in marks) <= seen:
            return
        start = time.process_time()
        cpu = spent + start - began - looking
        samples = made(agent, judge.noise[rows], asked).cpu()
        told: float | None = None
        if not isinstance(proxy, ScriptedOracle):
            with torch.no_grad():
                told = float(proxy.judge(samples[:, None]).mean())
        reward = float(scored(judge.oracle, samples, asked).double().mean())
        curve.append([queries, cpu, judge.score(samples, rows), reward, told])
        write_atomic(notes, json.dumps(curve).encode())
        looking += time.process_time() - start

    summary = align(config, folder, judge=judge, callback=look, picture=False)
    return {
        "budget": config.queries,
        **{key: summary[key] for key in KEPT},
        "reference_reward": float(judge.rewards.double().mean()),
        "optimum_reward": judge.optimum_reward,
        "cpu_seconds": curve[-1][1] if curve else None,
        "curve": curve,
    }
