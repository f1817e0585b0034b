"""Experiments: one file each, with the question, why it matters and what was found in its docstring.

An experiment is settings, a budget and a score: 0 = the untouched reference, 1 = the exact optimum at the
experiment's ``beta``. Its variants turn one knob; all agents get the same of everything. One that asks for no
reference of its own can be run on any task: ``basic@digits`` is ``basic`` there.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from prefenv.errors import ConfigError, UnknownNameError
from prefenv.evaluation import Judge
from prefenv.registry import make_task, parse
from prefenv.runs import RunConfig

NAMES = (
    "basic",
    "few",
    "pairs",
    "rare",
    "graded",
    "mistakes",
    "noisy",
    "proxy",
    "thin",
    "coarse",
    "size",
    "modes",
)


@dataclass(frozen=True)
class Experiment:
    """Settings, budget and seeds of an experiment.

    Args:
        settings: Settings of ``RunConfig`` that all runs share, the budget ``queries`` among them.
        variants: By label, what a variant sets besides; the score is the mean over them.
        seeds: Seeds of a full run, from 0.
        n_reference: Reference samples behind the optimum; more where it is rare or near the reference.
        n: Samples of each side of the score's distances.
    """

    settings: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    seeds: int = 5
    n_reference: int = 16384
    n: int = 2048

    def config(self, variant: str, agent: str, seed: int) -> RunConfig:
        """One run."""
        settings = {**self.settings, **self.variants[variant]}
        return RunConfig(agent=agent, seed=seed, device="cpu", **settings)

    def judge(self, variant: str) -> Judge:
        """What scores the runs of a variant: by the oracle's true score, else by the task's own oracle."""
        config = self.config(variant, "ppo", 0)
        return config.judge(n_reference=self.n_reference, n=self.n)

    def on(self, name: str) -> Experiment:
        """The same on another task: its reference, its oracle with this one's settings, its sizes if smaller.

        Raises:
            ConfigError: The experiment has a task, a reference or an oracle of its own.
        """
        task = make_task(name)
        oracle, settings = parse(self.settings.get("oracle", RunConfig().oracle))
        own = {"task", "checkpoint"} & {
            *self.settings,
            *(k for v in self.variants.values() for k in v),
        }
        if own or oracle != RunConfig().oracle:
            raise ConfigError(
                "an experiment with a task, a reference or an oracle of its own stays on it"
            )
        told = ",".join(f"{key}={value}" for key, value in settings.items())
        oracle = f"{task.default_oracle}:{told}" if told else task.default_oracle
        return replace(
            self,
            settings={**self.settings, "task": name, "oracle": oracle},
            n_reference=min(self.n_reference, 2 * task.samples),
            n=min(self.n, task.samples // 4),
        )


def on_task(name: str, task: str | None) -> str:
    """The name of an experiment on a task; None = as it stands, on shapes."""
    return f"{name}@{task}" if task else name


@functools.cache
def module(name: str) -> Any:
    """The module of an experiment.

    Raises:
        UnknownNameError: There is none.
    """
    plain = name.partition("@")[0]
    if plain not in NAMES:
        raise UnknownNameError(f"unknown experiment {plain!r}: choose one of {', '.join(NAMES)}")
    return importlib.import_module(f"benchmarks.experiments.{plain}")


def load(name: str) -> Experiment:
    """An experiment by name, ``NAME`` or ``NAME@TASK``.

    Raises:
        UnknownNameError: There is none, or no such task.
        ConfigError: It cannot be run on another task.
    """
    experiment, task = module(name).EXPERIMENT, name.partition("@")[2]
    return experiment.on(task) if task else experiment


def question(name: str) -> str:
    """What an experiment asks: its docstring's first line."""
    return module(name).__doc__.strip().splitlines()[0].split(": ", 1)[-1]
