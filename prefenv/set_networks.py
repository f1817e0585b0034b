"""Velocity networks for unordered sets of points: ``(B, P, D)``, where no order of the P points is meant.

``SetVelocity`` is permutation-equivariant (Zaheer et al. 2017, Deep Sets, arXiv 1703.06114): every point goes
through the same layers, and sees the others only through their mean. ``HilDDVelocity`` is the network of HIL-DD's
toy as it was published, and ``Rescaled`` carries a network that was trained from another noise into ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefenv.flow import RectifiedFlow
from prefenv.networks import VelocityField

_ROWS = 16


class SetVelocity(VelocityField):
    """A residual network on points: blocks ``h + W2 silu(W1 norm(h) + U mean(norm(h)) + time)``.

    Args:
        event_shape: Points of a set and their dimension, ``(P, D)``; any P will do in ``forward``.
        width: Channels of the hidden layers.
        blocks: Residual blocks.
        frequencies: Sine and cosine features of ``t``, geometric from 1 to 1000 rad: with hundreds of points a
            set's class is decided soon after ``t = 0``.
        waves: Sine and cosine features of each coordinate, ``pi/2, pi, ... waves pi/2``.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        width: int = 64,
        blocks: int = 3,
        frequencies: int = 32,
        waves: int = 4,
    ):
        super().__init__(event_shape)
        dim = self.event_shape[-1]
        self.inp = nn.Linear(dim * (1 + 2 * waves), width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.ups = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.means = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(blocks))
        self.times = nn.ModuleList(
            nn.Linear(2 * frequencies, width, bias=False) for _ in range(blocks)
        )
        self.downs = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        frequency = torch.exp(torch.linspace(0.0, math.log(1000.0), frequencies))
        self.register_buffer("frequency", frequency, persistent=False)
        wave = torch.arange(1, waves + 1) * (math.pi / 2)
        self.register_buffer("wave", wave, persistent=False)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() or x.device.type != "cpu" or len(x) <= _ROWS:
            return self._body(x, t)
        # Hidden layers of so few sets stay in a CPU's cache.
        parts = zip(x.split(_ROWS), t.expand(len(x)).split(_ROWS), strict=True)
        return torch.cat([self._body(*part) for part in parts])

    def _body(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t.to(x.dtype).reshape(-1, 1, 1) * self.get_buffer("frequency").to(x.dtype)
        time = torch.cat([angle.sin(), angle.cos()], -1)
        phase = (x[..., None] * self.get_buffer("wave").to(x.dtype)).flatten(-2)
        h = self.inp(torch.cat([x, phase.sin(), phase.cos()], -1))
        layers = zip(self.norms, self.ups, self.means, self.times, self.downs, strict=True)
        for norm, up, mean, clock, down in layers:
            z = norm(h)
            h = h + down(F.silu(up(z) + (mean(z.mean(1, keepdim=True)) + clock(time))))
        return self.out(F.silu(self.norm(h)))


class HilDDVelocity(VelocityField):
    """The published network of HIL-DD's toy: one MLP for all points, norms over points and channels together.

    ``x, 0.2 E[floor(100 t)] -> (Linear 256 -> LayerNorm(P, 256) -> LeakyReLU) x 3 -> Linear 2``, no biases. The
    norms are all that points see of each other, and have weights for each point's place: it is not equivariant.

    The public code's ``int(100 t)`` falls one short at 2 of its sampler's 100 times, by rounding; ours does not.

    Args:
        event_shape: ``(P, 2)``.
        width: Channels of the hidden layers.
    """

    def __init__(self, event_shape: Sequence[int] = (400, 2), width: int = 256):
        super().__init__(event_shape)
        points, dim = self.event_shape
        self.time_embedding = nn.Embedding(100, 4)
        self.fc1 = nn.Linear(dim + 4, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)
        self.fc3 = nn.Linear(width, width, bias=False)
        self.fc4 = nn.Linear(width, dim, bias=False)
        self.layernorm1 = nn.LayerNorm([points, width])
        self.layernorm2 = nn.LayerNorm([points, width])
        self.layernorm3 = nn.LayerNorm([points, width])

    def at_index(self, x: Tensor, index: Tensor) -> Tensor:
        """Velocities of clouds ``(B, P, 2)`` at time indices ``(B,)`` or a scalar, in [0, 99]."""
        time = (0.2 * self.time_embedding(index)).reshape(-1, 1, 4).expand(*x.shape[:2], 4)
        h = torch.cat([x, time], -1)
        h = F.leaky_relu(self.layernorm1(self.fc1(h)))
        h = F.leaky_relu(self.layernorm2(self.fc2(h)))
        h = F.leaky_relu(self.layernorm3(self.fc3(h)))
        return self.fc4(h)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.at_index(x, (100 * t + 1e-3).long().clamp(0, 99))


class Rescaled(VelocityField):
    """A field trained from noise ``N(0, std^2 I)``, in coordinates where noise is ``N(0, I)``: the same ODE.

    Its path ``x_t = (1 - t) std eps + t x1`` and ours ``y_u = (1 - u) eps + u x1`` have the same share of noise
    where ``t = std u / (1 - u + std u)``, and there ``y = c x`` with ``c = (1 - u + std u) / std``. Hence

        v_y(y, u) = ((std - 1) x + v(x, t) / c) / std,   x = y / c

    for any ``v``, trained or not, and an Euler step of one is an Euler step of the other: equal steps in ``t`` are
    the grid of ``shift = std`` in ``u``.

    Args:
        field: The field as it was trained.
        std: Standard deviation of its noise.
    """

    def __init__(self, field: VelocityField, std: float):
        super().__init__(field.event_shape)
        self.field, self.std = field, std

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        mix = 1 - t + self.std * t
        c = (mix / self.std).to(x.dtype).reshape(-1, *[1] * len(self.event_shape))
        inside = x / c
        v = self.field(inside, self.std * t / mix, condition)
        return ((self.std - 1) * inside + v / c) / self.std


class RescaledFlow(RectifiedFlow):
    """A flow whose matching error is that of the field as it was trained: from its own noise, at its own times.

    Args:
        field: The rescaled field.
    """

    field: Rescaled

    def residual(
        self, x0: Tensor, x1: Tensor, t: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """As ``RectifiedFlow.residual``, for noises ``x0 ~ N(0, I)``, with ``std x0`` in their place."""
        source = self.field.std * x0
        s = t.to(x1.dtype).reshape(-1, *[1] * (x1.dim() - 1))
        v = self.field.field(torch.lerp(source, x1, s), t, condition)
        return (v - (x1 - source)).square().flatten(1).mean(1)
