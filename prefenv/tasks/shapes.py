"""Shapes: whole curves of 64 ordered points in the plane, a Swiss roll or an S curve.

The curves are scikit-learn's (``make_swiss_roll``: ``t cos t, t sin t``, ``t`` in [1.5 pi, 4.5 pi];
``make_s_curve``: ``sin t, sign(t) (cos t - 1)``, ``t`` in [-1.5 pi, 1.5 pi]; the third axis dropped), at 64
equal steps of ``t``, centred and scaled to unit variance per coordinate, then turned by U(-0.4, 0.4) rad,
scaled by U(0.8, 1.2) and blurred by N(0, 0.03^2) per coordinate. **25 % are S curves**: that model A makes
many more rolls than S curves is built in, not an accident.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from prefenv.device import stratified_uniform
from prefenv.errors import ConfigError
from prefenv.networks import DataPrediction, VelocityField
from prefenv.tasks.base import Task

ROLL, S_CURVE = 0, 1


def template(kind: int, points: int = 64) -> Tensor:
    """The clean curve ``(points, 2)``, centred, unit variance per coordinate on average, float64."""
    if kind == ROLL:
        t = torch.linspace(1.5 * torch.pi, 4.5 * torch.pi, points, dtype=torch.float64)
        xy = torch.stack([t * t.cos(), t * t.sin()], 1)
    else:
        t = torch.linspace(-1.5 * torch.pi, 1.5 * torch.pi, points, dtype=torch.float64)
        xy = torch.stack([t.sin(), t.sign() * (t.cos() - 1)], 1)
    xy = xy - xy.mean(0)
    return xy / xy.square().mean().sqrt()


def procrustes_residual(x: Tensor, curve: Tensor) -> Tensor:
    """How far each shape is from a curve after the best shift, turn and scale: similarity Procrustes.

    With points as complex numbers, centred, the best fit ``c w`` of the curve ``w`` to the shape ``z`` is a
    regression, ``c = <w, z> / |w|^2``, and the residual's square is ``|z|^2 - |<w, z>|^2 / |w|^2``.

    Args:
        x: Shapes, ``(..., P, 2)``.
        curve: Template, ``(P, 2)``.

    Returns:
        ``(...)``: the rms distance of the points to the fitted curve, in the shape's own unit (the shape scaled
        to unit variance per coordinate), in [0, sqrt 2]. Differentiable. 0.042 is a point noise of 0.03.
    """
    z, real, imag = _fit(x, curve)
    power = z.square().sum((-2, -1)).clamp_min(1e-12)
    left = (1 - (real.square() + imag.square()) / power).clamp_min(1e-12)
    return (2 * left).sqrt()


def _fit(x: Tensor, curve: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centred shapes, and the real and imaginary part of ``<w, z>`` with the curve scaled to ``|w| = 1``."""
    z = x - x.mean(-2, keepdim=True)
    w = curve.to(x)
    w = w / w.square().sum().sqrt()
    real = (z * w).sum((-2, -1))
    imag = (z[..., 1] * w[:, 0] - z[..., 0] * w[:, 1]).sum(-1)
    return z, real, imag


@dataclass(frozen=True)
class Shapes(Task):
    """The shapes task.

    Args:
        points: Points of a curve.
        s_rate: Share of S curves in the data.
        noise: Standard deviation of the point noise per coordinate.
        turn: Largest rotation in rad.
        scale: Smallest and largest scale.
        predict: What the network says: ``velocity``, or ``data`` (``DataPrediction``, which passes more
            dimensions than it is wide).
    """

    name: str = "shapes"
    default_oracle: str = "s-curve"
    classes: tuple[str, ...] = ("roll", "s-curve")
    shift: float = (
        2.0  # roll or S is decided before t = 0.3: equal steps would make 22 % S curves of 25 %
    )
    points: int = 64
    s_rate: float = 0.25
    noise: float = 0.03
    turn: float = 0.4
    scale: tuple[float, float] = (0.8, 1.2)
    predict: Literal["velocity", "data"] = "velocity"

    def __post_init__(self) -> None:
        if not isinstance(self.points, int) or self.points < 8:
            raise ConfigError(f"shapes: points must be a whole number from 8, not {self.points!r}")
        if not 0 <= self.s_rate <= 1:
            raise ConfigError(f"shapes: s_rate must lie in [0, 1], not {self.s_rate!r}")
        if self.predict not in ("velocity", "data"):
            raise ConfigError(f"shapes: predict must be velocity or data, not {self.predict!r}")

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (self.points, 2)

    def network(self) -> VelocityField:
        plain = super().network()
        return DataPrediction(plain) if self.predict == "data" else plain

    def data(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        kind = (stratified_uniform(n, generator) < self.s_rate).long()
        curves = torch.stack([template(k, self.points) for k in (ROLL, S_CURVE)]).float()
        angle = (torch.rand(n, generator=generator) * 2 - 1) * self.turn
        low, high = self.scale
        size = low + (high - low) * torch.rand(n, generator=generator)
        cos, sin = size * angle.cos(), size * angle.sin()
        rotation = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)
        blur = self.noise * torch.randn(n, self.points, 2, generator=generator)
        return curves[kind] @ rotation + blur, kind

    def residual(self, x: Tensor) -> Tensor:
        """Residual to the nearer template, ``(...)``."""
        return self.residuals(x).amin(-1)

    def residuals(self, x: Tensor) -> Tensor:
        """Residual to each class's template, ``(..., 2)``."""
        each = [procrustes_residual(x, template(k, self.points)) for k in (ROLL, S_CURVE)]
        return torch.stack(each, -1)

    def classify(self, x: Tensor) -> Tensor:
        return self.residuals(x).argmin(-1)

    def pose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Turn in rad (counter-clockwise) and scale of the nearer template's best fit, ``(...)`` each."""
        kind = self.classify(x)
        size = math.sqrt(2 * self.points)  # |w| of a template of unit variance per coordinate
        fits = [_fit(x, template(k, self.points))[1:] for k in (ROLL, S_CURVE)]
        real, imag = (torch.where(kind == S_CURVE, s, r) for r, s in zip(*fits, strict=True))
        return torch.atan2(imag, real), torch.hypot(real, imag) / size

    def draw(self, axes, x: np.ndarray, color: str) -> None:
        axes.plot(x[:, 0], x[:, 1], color=color, lw=1.0, alpha=0.5)
        axes.scatter(x[:, 0], x[:, 1], s=7, color=color, edgecolors="white", linewidths=0.2)
        axes.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal", xticks=[], yticks=[])
