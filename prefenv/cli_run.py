"""The commands ``prefenv align``, ``demo`` and ``train``: what makes models."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from prefenv.errors import ConfigError
from prefenv.registry import lookup, make_task, parse
from prefenv.runs import RunConfig


@dataclass(frozen=True)
class Align(RunConfig):
    """Run one agent against an oracle and write a run directory.

    Example: prefenv align --agent d3po --oracle s-curve --queries 4096 --panel-size 4 --seed 0

    Args:
        out: The run's directory; default: runs/ and a name that hashes the settings. A finished run is read, a
            half-done one goes on where it stopped.
        json: Print the summary as one JSON object, and nothing else, on stdout.
    """

    out: Path | None = None
    json: bool = False

    def run(self) -> int:
        """Run it."""
        from prefenv.runs import align

        fields = [f.name for f in dataclasses.fields(RunConfig)]
        config = RunConfig(**{name: getattr(self, name) for name in fields})
        folder = self.out or Path("runs") / config.name
        summary = align(config, folder, progress=True)
        if self.json:
            print(json.dumps(summary))
            return 0
        print(
            f"{config.agent}: preferred {summary['preferred_rate']:.3f} "
            f"(reference {summary['reference_preferred_rate']:.3f}), score {summary['score']:.3f} "
            f"(optimum {summary['optimum_score']:.3f}), residual {summary['residual']:.4f} "
            f"(reference {summary['reference_residual']:.4f}), KL {summary['kl_nats'] or float('nan'):.1f} nats, "
            f"{summary['queries']} queries in {summary['panels']} panels, {summary['seconds']:.1f} s"
        )
        print(f"written to {folder}")
        return 0


@dataclass(frozen=True)
class Demo:
    """Align all agents at one budget and draw what they make: one table, two figures.

    Args:
        out: Folder of all that is made; finished runs in it are read. Default: runs/demo, or runs/demo-TASK.
        agents: Which agents; default: four that the task names.
        task: Task, by name.
        oracle: Oracle, by name; None = the task's own.
        queries: Budget of each agent: samples that the oracle judges; None = as the task says (shapes: 4,096).
        panel_size: Samples shown together.
        seed: Seed of everything random.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        workers: Processes; None = one per core.
        json: Print the summaries as one JSON object, and nothing else, on stdout.
    """

    out: Path | None = None
    agents: tuple[str, ...] = ()
    task: str = "shapes"
    oracle: str | None = None
    queries: int | None = None
    panel_size: int = 4
    seed: int = 0
    device: str = "auto"
    workers: int | None = None
    json: bool = False

    def run(self) -> int:
        """Run it."""
        from prefenv.demo import demo, folder_of

        task = make_task(self.task)
        agents = self.agents or task.demo.agents
        for name in agents:
            lookup("agent", parse(name)[0])
        config = RunConfig(
            oracle=self.oracle or task.default_oracle,
            task=self.task,
            queries=self.queries or task.demo.queries,
            rows=task.demo.rows if self.queries is None else None,
            panel_size=self.panel_size,
            seed=self.seed,
            device=self.device,
        )
        out = self.out or folder_of(self.task)
        text, summaries = demo(out, agents, config, workers=self.workers)
        if self.json:
            print(json.dumps({"runs": summaries}))
        else:
            print(text)
            print(f"figures: {out / 'shapes.png'} and {out / 'frontier.png'}")
        return 0


@dataclass(frozen=True)
class Train:
    """Train a task's reference (model A) from scratch; writes a checkpoint and its card.

    Args:
        task: Task, by name; settings may follow, ``shapes:s_rate=0.02``.
        out: The checkpoint, a .safetensors file; default: checkpoints/TASK.safetensors here.
        seed: Seed of weights, data and noise.
        iterations: Optimiser steps; None = the task's own number.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        json: Print the card as one JSON object, and nothing else, on stdout.
    """

    task: str = "shapes"
    out: Path | None = None
    seed: int = 0
    iterations: int | None = None
    device: str = "auto"
    json: bool = False

    def run(self) -> int:
        """Run it."""
        from prefenv.runs import writable
        from prefenv.train import save_reference, train_reference

        task = make_task(self.task)
        path = self.out or Path("checkpoints") / f"{task.name}.safetensors"
        if path.suffix != ".safetensors":
            raise ConfigError(f"--out {path}: a checkpoint is a .safetensors file")
        writable(path.parent)
        config = task.train
        if self.iterations is not None:
            config = dataclasses.replace(config, iterations=self.iterations)
        trained = train_reference(task, config, seed=self.seed, device=self.device)
        save_reference(path, trained, task)
        print(json.dumps(trained.card) if self.json else f"written to {path}")
        return 0
