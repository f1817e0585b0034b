"""Gaussians: one sample is one point of the plane, from a mixture of 8 Gaussians on a circle.

    p(x) = sum_k m_k N(x; c_k, std^2 I),   c_k = radius (cos, sin)(k pi / 4),   sum_k m_k = 1

The classic toy of flow matching, and of Preference Flow Matching (Kim et al. 2024, arXiv 2405.20234). The masses
are unequal: of two opposite modes, one has 3/16 and the other 1/16, the rest 1/8 each. A model that forgets the
small one of the two when both are preferred is seen at once (the ``two-modes`` oracle). The density and the
velocity are closed forms, so that whatever the evaluation estimates can be held against exact numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from prefenv.device import stratified_uniform
from prefenv.errors import ConfigError
from prefenv.flow import RectifiedFlow
from prefenv.networks import MixtureVelocity, VelocityMLP
from prefenv.tasks.base import Task, TrainConfig

MODES = 8


@dataclass(frozen=True)
class Gaussians(Task):
    """The eight-Gaussians task.

    Args:
        radius: Of the circle on which the modes lie.
        std: Standard deviation of each mode, per coordinate.
        masses: Share of each mode in the data, counter-clockwise from the east, in any unit.
    """

    name: str = "gaussians"
    default_oracle: str = "two-modes"
    classes: tuple[str, ...] = (
        "east", "northeast", "north", "northwest", "west", "southwest", "south", "southeast",
    )  # fmt: skip
    overlay: bool = True
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(iterations=6000, batch=1024, early=1.0, ema=0.998)
    )
    radius: float = 2.0
    std: float = 0.2
    masses: tuple[float, ...] = (2, 3, 2, 2, 2, 1, 2, 2)

    def __post_init__(self) -> None:
        if len(self.masses) != MODES or min(self.masses) < 0 or sum(self.masses) <= 0:
            raise ConfigError(
                f"gaussians: masses are {MODES} numbers from 0, not all 0: not {self.masses!r}"
            )
        if not (self.radius > 0 and self.std > 0):
            raise ConfigError(
                f"gaussians: radius and std must be positive, not {self.radius!r}, {self.std!r}"
            )

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (2,)

    @property
    def centres(self) -> Tensor:
        """Centres of the modes, ``(8, 2)`` float64."""
        angle = torch.arange(MODES, dtype=torch.float64) * (2 * math.pi / MODES)
        return self.radius * torch.stack([angle.cos(), angle.sin()], 1)

    @property
    def shares(self) -> Tensor:
        """Masses of the modes, ``(8,)`` float64, sum 1."""
        masses = torch.tensor(self.masses, dtype=torch.float64)
        return masses / masses.sum()

    def network(self) -> VelocityMLP:
        return VelocityMLP(self.event_shape, width=128)

    def exact_flow(self) -> RectifiedFlow:
        """The flow whose velocity is the closed form: a perfect reference, for tests (it cannot be trained)."""
        return RectifiedFlow(MixtureVelocity(self.centres.float(), self.std, self.shares.float()))

    def data(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        ends = self.shares.cumsum(0)
        kind = torch.bucketize(stratified_uniform(n, generator).double(), ends, right=True)
        kind = kind.clamp_max(MODES - 1)
        blur = self.std * torch.randn(n, 2, generator=generator)
        return self.centres.float()[kind] + blur, kind

    def log_density(self, x: Tensor) -> Tensor:
        """``log p(x)`` of the data in nats, ``(...)`` for points ``(..., 2)``."""
        square = self.distances(x).square() / self.std**2
        log_norm = math.log(2 * math.pi * self.std**2)
        return (self.shares.to(x).log() - square / 2).logsumexp(-1) - log_norm

    def quadrature(self, points: int = 400) -> tuple[Tensor, Tensor]:
        """Nodes ``(n, 2)`` of a square grid and the data's probability at each ``(n,)``, float64, sum 1.

        Sums over it are integrals over the data, exact to about 1e-9 for anything as smooth as the density.
        """
        edge = self.radius + 6 * self.std
        line = torch.linspace(-edge, edge, points, dtype=torch.float64)
        nodes = torch.cartesian_prod(line, line)
        return nodes, self.log_density(nodes).softmax(0)

    def distances(self, x: Tensor) -> Tensor:
        """Distance to each mode's centre, ``(..., 8)`` for points ``(..., 2)``."""
        return (x[..., None, :] - self.centres.to(x)).norm(dim=-1)

    def residual(self, x: Tensor) -> Tensor:
        """Distance to the nearest centre in standard deviations, ``(...)``; the data's median is 1.18."""
        return self.distances(x).amin(-1) / self.std

    def classify(self, x: Tensor) -> Tensor:
        """The nearest mode."""
        return self.distances(x).argmin(-1)

    def draw(self, axes, x: np.ndarray, color: str) -> None:
        points, edge = x.reshape(-1, 2), self.radius + 0.6
        alone = len(points) == 1
        centres = self.centres.numpy()
        axes.scatter(centres[:, 0], centres[:, 1], s=30, color="0.85", lw=0, zorder=0)
        axes.scatter(
            points[:, 0], points[:, 1], s=40 if alone else 3, color=color, lw=0,
            alpha=1.0 if alone else 0.4,
        )  # fmt: skip
        axes.set(xlim=(-edge, edge), ylim=(-edge, edge), aspect="equal", xticks=[], yticks=[])
