"""What a task is: data, a network for it, a reference checkpoint, a default oracle, and how to draw it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from prefenv.flow import RectifiedFlow
from prefenv.networks import VelocityField, VelocityMLP


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
    """

    iterations: int = 5000
    batch: int = 512
    lr: float = 2e-3
    weight_decay: float = 1e-4
    early: float = 2.0
    ema: float = 0.995
    clip: float = 1.0


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

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        raise NotImplementedError

    def network(self) -> VelocityField:
        """A fresh velocity network of the task's standard size."""
        return VelocityMLP(self.event_shape)

    def flow(self) -> RectifiedFlow:
        """A fresh flow of that network."""
        return RectifiedFlow(self.network())

    def data(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``n`` real samples ``(n, *event_shape)`` float32 and their classes ``(n,)``, on the CPU."""
        raise NotImplementedError

    def residual(self, x: Tensor) -> Tensor:
        """Quality of each sample, 0 = perfect, ``(n,)``."""
        raise NotImplementedError

    def classify(self, x: Tensor) -> Tensor:
        """Class of each sample, ``(n,)`` indices into ``classes``."""
        raise NotImplementedError

    def embed(self, x: Tensor) -> Tensor:
        """Where samples lie as points ``(n, d)``, whose distances say how different they are."""
        return x.flatten(1)

    def draw(self, axes, x: np.ndarray, color: str) -> None:
        """Draw one sample ``(*event_shape,)`` on matplotlib axes; with ``overlay`` also many at once."""
        raise NotImplementedError

    def points2d(self, x: np.ndarray) -> np.ndarray:
        """One sample as points in the plane ``(P, 2)``, for text terminals and web pages."""
        return np.asarray(x).reshape(-1, 2)
