"""What a task is: data, a network for it, a reference checkpoint, a default oracle, and how to draw it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefenv.device import make_generator
from prefenv.errors import ConfigError
from prefenv.flow import RectifiedFlow
from prefenv.networks import GuidedVelocity, VelocityField, VelocityMLP
from prefenv.tasks.conditions import Classes, Condition, panels_of


def own_name(task: str, data_path: str) -> str:
    """Name of a task of a user's own data file, ``digits+mnist``: no shipped name has a plus sign.

    Minari's files, ``.../hopper/expert-v0/data/main_data.hdf5``, are named after their folders.
    """
    _, *parts = Path(os.path.abspath(data_path)).parts
    folders = parts[-4:-2] if parts[-2:] == ["data", "main_data.hdf5"] else []
    return f"{task}+{'-'.join(folders) or Path(data_path).stem}"


@dataclass(frozen=True)
class TrainConfig:
    """How a reference is trained.

    Args:
        iterations: Optimiser steps.
        batch: Samples per step, fresh from the task's generator.
        lr: Peak learning rate of the one-cycle schedule.
        weight_decay: AdamW's.
        early: Times are ``t = u^early``, u uniform: above 1, more of them near the noise, where classes are
            decided. The velocity that minimises the loss is the same.
        ema: Decay of the weight average that becomes the checkpoint.
        clip: Largest gradient norm.
        drop: Share of the conditions that are left out (made null), which guidance needs; 0 = none.
    """

    iterations: int = 5000
    batch: int = 512
    lr: float = 2e-3
    weight_decay: float = 1e-4
    early: float = 2.0
    ema: float = 0.995
    clip: float = 1.0
    drop: float = 0.0


@dataclass(frozen=True)
class Demo:
    """What ``prefenv demo`` shows of a task.

    Args:
        agents: Agents, by name; settings may follow.
        queries: Budget of each: samples that the oracle judges.
        rows: Samples of one round; None = the budget in about 32 rounds. Fewer rounds cost less.
    """

    agents: tuple[str, ...] = ("hil-dd", "pfm", "d3po", "ppo")
    queries: int = 4096
    rows: int | None = None


@dataclass(frozen=True)
class Task:
    """Base of all tasks; a subclass is one file in ``prefenv/tasks`` and one line in the registry.

    Args:
        name: The task's name, its checkpoint's file name too.
        default_oracle: Name of the oracle that judges where none is given.
        classes: Names of the classes ``classify`` tells apart.
        beta: Temperature of the stated optimum ``p* ~ p_ref exp(r / beta)``.
        shift: Of the grid of times on which samples are made, see ``prefenv.flow.time_grid``; 1 = equal steps.
        bound: Largest absolute coordinate an action may have; the data lies far inside.
        samples: Samples that a measurement of a reference makes; an evaluation makes twice as many.
        overlay: Whether a figure shows many samples in one picture: where each is a point, say.
        train: How the reference is trained.
        condition: What samples are conditioned on, ``Classes(n)`` or ``Vector(dim)``; None = nothing.
        guidance: Weight ``w`` of classifier-free guidance, where the training drops conditions; 1 = none.
        demo: What ``prefenv demo`` shows of it.
    """

    name: str
    default_oracle: str
    classes: tuple[str, ...] = ()
    beta: float = 0.1
    shift: float = 1.0
    bound: float = 10.0
    samples: int = 8192
    overlay: bool = False
    train: TrainConfig = field(default_factory=TrainConfig)
    condition: Condition | None = None
    guidance: float = 1.0
    demo: Demo = field(default_factory=Demo)

    @property
    def text(self) -> str:
        """Name and settings by which ``make_task`` makes it again, ``digits:data_path=mnist.npz``."""
        known = {f.name: f.default for f in fields(self)}
        given = {k: getattr(self, k) for k in known if k != "name" and getattr(self, k) != known[k]}
        told = [f"{k}={v}" for k, v in given.items() if isinstance(v, str | int | float)]
        name = known["name"] if isinstance(known["name"], str) else self.name
        return ":".join([name, *([",".join(told)] if told else [])])

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        raise NotImplementedError

    def network(self) -> VelocityField:
        """A fresh velocity network of the task's standard size."""
        if self.condition is None:
            return VelocityMLP(self.event_shape)
        guided = self.train.drop > 0
        field = VelocityMLP(self.event_shape, **self.condition.network(guided))
        return GuidedVelocity(field, self.condition.null, self.guidance) if guided else field

    def flow(self) -> RectifiedFlow:
        """A fresh flow of that network."""
        return RectifiedFlow(self.network())

    def data(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``n`` real samples ``(n, *event_shape)`` float32 and their classes ``(n,)``, on the CPU.

        Of a conditional task, their conditions ``(n, ...)`` instead of classes.
        """
        raise NotImplementedError

    def draw_conditions(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` conditions to ask for, on the CPU: any class alike, or vectors as the data has them."""
        if isinstance(self.condition, Classes):
            return torch.randint(self.condition.n, (n,), generator=generator)
        return self.data(n, generator)[1]

    def conditions(
        self, given: Any, rows: int, panel_size: int, generator: torch.Generator
    ) -> Tensor | None:
        """The conditions of ``rows`` rows, one for each panel; None where the task has none.

        Args:
            given: Of each row, ``(rows, ...)``, or one for all; None = drawn.
            rows: Number of rows.
            panel_size: Rows of a panel.
            generator: Source of what is drawn.

        Raises:
            ConfigError: What is given is no condition of this task, of another shape, or differs within a panel.
        """
        kind = self.condition
        if kind is None:
            if given is not None:
                raise ConfigError(f"task {self.name!r} has no conditions: leave it out")
            return None
        if given is None:
            drawn = self.draw_conditions(rows // panel_size, generator)
            return drawn.repeat_interleave(panel_size, 0)
        condition, shape = kind.tensor(given), (rows, *kind.shape)
        if condition.shape == kind.shape:
            condition = condition.expand(shape)
        if condition.shape != shape:
            raise ConfigError(f"condition has shape {tuple(condition.shape)}, expected {shape}")
        panels_of(condition, panel_size)
        return condition.clone()

    def fixed_conditions(self, n: int = 16) -> Tensor:
        """The conditions that evaluation goes through, always the same: every class, or ``n`` vectors."""
        if isinstance(self.condition, Classes):
            return torch.arange(self.condition.n)
        return self.draw_conditions(n, make_generator(0, stream="fixed conditions"))

    @property
    def width(self) -> int:
        """Numbers of a row of ``rows``."""
        return math.prod(self.event_shape) + (self.condition.width if self.condition else 0)

    def rows(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Points ``(n, *event_shape)`` and their conditions' features, ``(n, width)``, for a plain network."""
        if self.condition is None or condition is None:
            return x.flatten(1)
        return torch.cat([x.flatten(1), self.condition.features(condition)], 1)

    def residual(self, x: Tensor) -> Tensor:
        """Quality of each sample, 0 = perfect, ``(n,)``."""
        raise NotImplementedError

    def classify(self, x: Tensor) -> Tensor:
        """Class of each sample, ``(n,)`` indices into ``classes``; all 0 where the task names none."""
        return torch.zeros(len(x), dtype=torch.long, device=x.device)

    def embed(self, x: Tensor) -> Tensor:
        """Where samples lie as points ``(n, d)``, whose distances say how different they are."""
        return x.flatten(1)

    def compare(self, x: Tensor, data: Tensor) -> dict[str, float]:
        """What the field says of a set of samples beside one of data, for the card; nothing by default."""
        return {}

    def draw(self, axes, x: np.ndarray, color: str) -> None:
        """Draw one sample ``(*event_shape,)`` on matplotlib axes; with ``overlay`` also many at once."""
        raise NotImplementedError

    def points2d(self, x: np.ndarray) -> np.ndarray:
        """One sample as points in the plane ``(P, 2)``, for text terminals and web pages."""
        return np.asarray(x).reshape(-1, 2)
