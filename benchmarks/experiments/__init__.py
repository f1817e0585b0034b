"""Experiments: one file each, with the question, why it matters and what was found in its docstring.

An experiment is settings, a budget and a score: 0 = the untouched reference, 1 = the exact optimum at the
experiment's ``beta``. Its variants turn one knob; all agents get the same of everything.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prefenv.errors import UnknownNameError
from prefenv.evaluation import Judge
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


@functools.cache
def module(name: str) -> Any:
    """The module of an experiment.

    Raises:
        UnknownNameError: There is none.
    """
    if name not in NAMES:
        raise UnknownNameError(f"unknown experiment {name!r}: choose one of {', '.join(NAMES)}")
    return importlib.import_module(f"benchmarks.experiments.{name}")


def load(name: str) -> Experiment:
    """An experiment by name.

    Raises:
        UnknownNameError: There is none.
    """
    return module(name).EXPERIMENT


def question(name: str) -> str:
    """What an experiment asks: its docstring's first line."""
    return module(name).__doc__.strip().splitlines()[0].split(": ", 1)[-1]
