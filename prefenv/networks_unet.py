"""A small U-Net for images: ``v(x, t, label)``.

One level down and up again (Ronneberger et al. 2015, arXiv 1505.04597), residual blocks whose norms are scaled and
shifted by what the time and the label say (FiLM, Perez et al. 2018, arXiv 1709.07871). Any even height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefenv.errors import ConfigError
from prefenv.networks import VelocityField, needed


def still(layer: nn.Module) -> None:
    """Make a layer's outputs zero in the beginning."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class Block(nn.Module):
    """``skip(x) + conv(silu(film(norm(conv(silu(norm(x)))))))``, ``(B, n_in, H, W)`` to ``(B, n_out, H, W)``.

    Args:
        n_in: Channels that come in.
        n_out: Channels that go out.
        told: Length of what it is told.
    """

    def __init__(self, n_in: int, n_out: int, told: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, n_in), nn.GroupNorm(4, n_out)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.film = nn.Linear(told, 2 * n_out)
        self.skip = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        still(self.conv2)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.film(told)[..., None, None].chunk(2, 1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        return self.skip(x) + self.conv2(F.silu(h * (1 + scale) + shift))


class VelocityUNet(VelocityField):
    """The U-Net.

    Args:
        event_shape: ``(channels, height, width)``, height and width even.
        width: Channels at the full size, a multiple of 4; twice as many below.
        classes: Labels, the null one of guidance among them.
        frequencies: Sine and cosine features of ``t``, geometric from 1 to 100 rad.

    Raises:
        ConfigError: Images of an odd size, or a width that is no multiple of 4.
    """

    def __init__(
        self, event_shape: Sequence[int], width: int = 24, classes: int = 11, frequencies: int = 16
    ):
        super().__init__(event_shape)
        channels, *size = self.event_shape
        if any(n % 2 for n in size):
            raise ConfigError(f"the U-Net halves its images: even sizes, not {size}")
        if not isinstance(width, int) or width < 4 or width % 4:
            raise ConfigError(f"the U-Net's channels are a multiple of 4, not {width!r}")
        told = 4 * width
        self.time, self.label = nn.Linear(2 * frequencies, told), nn.Embedding(classes, told)
        self.mix = nn.Linear(told, told)
        self.inp = nn.Conv2d(channels, width, 3, padding=1)
        self.first = Block(width, width, told)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.low = nn.ModuleList(Block(2 * width, 2 * width, told) for _ in range(2))
        self.up = nn.Conv2d(2 * width, width, 1)
        self.last = Block(2 * width, width, told)
        self.norm = nn.GroupNorm(4, width)
        self.out = nn.Conv2d(width, channels, 3, padding=1)
        still(self.out)
        frequency = torch.exp(torch.linspace(0.0, math.log(100.0), frequencies))
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        angle = t.to(x.dtype).reshape(-1, 1) * self.get_buffer("frequency")
        told = self.time(torch.cat([angle.sin(), angle.cos()], -1)) + self.label(needed(condition))
        told = F.silu(self.mix(F.silu(told)))
        high = self.first(self.inp(x), told)
        low = self.down(high)
        for block in self.low:
            low = block(low, told)
        back = F.interpolate(self.up(low), scale_factor=2.0)
        return self.out(F.silu(self.norm(self.last(torch.cat([high, back], 1), told))))
