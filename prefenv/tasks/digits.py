"""Digits: small pictures of handwritten digits, asked for by class: PFM's and D3PO's image setting, small.

The pictures are scikit-learn's ``load_digits`` (UCI's *Optical Recognition of Handwritten Digits*, Alpaydin &
Kaynak 1998, CC BY 4.0; 1,797 of 8 x 8 pixels, levels 0 to 16), or those of any ``.npz`` with ``x_train`` and
``y_train``: a local copy of MNIST is read, nothing is ever downloaded. A level becomes ``2 (level + U(0, 1)) /
(top + 1) - 1``, uniform within its own cell; ink is 1. The condition (the prompt) is the digit. The pictures are
split once: 5/9 train the generator, 1/3 train the judge (``oracles/legible.py``), 1/9 test it. **15 % of the
generator's labels are wrong**: that model A often makes another digit than the one asked for is built in, so that
there is something to prefer (rightly labelled, it is as legible as the real pictures are to this judge).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from prefenv.device import make_generator
from prefenv.errors import ConfigError
from prefenv.networks import GuidedVelocity, VelocityField
from prefenv.networks_unet import VelocityUNet
from prefenv.tasks.base import Demo, Task, TrainConfig, own_name
from prefenv.tasks.conditions import Classes, Condition

TEN = Classes(10)
Part = Literal["generator", "judge", "test"]
NEAR = 2000  # held-out pictures that a sample is compared with


def whole(values: np.ndarray, top: int) -> bool:
    """Whether all are whole numbers from 0 to ``top``."""
    return bool(((values >= 0) & (values <= top) & (values % 1 == 0)).all())


def checked(levels: np.ndarray, digits: np.ndarray, path: str) -> None:
    """Pictures and digits of a file.

    Raises:
        ConfigError: Of another shape, or no levels from 0 to 255 and digits from 0 to 9.
    """
    sides = levels.shape[1:]
    if len(sides) != 2 or min(sides) < 4 or any(n % 2 for n in sides) or len(levels) < 9:
        raise ConfigError(
            f"digits: x_train of {path} has shape {levels.shape}: give (n, H, W) with at least 9 pictures "
            "of even sides from 4, pad them perhaps"
        )
    if not whole(levels, 255) or not levels.any():
        raise ConfigError(
            f"digits: x_train of {path} goes from {levels.min():g} to {levels.max():g}: give levels that are "
            "whole numbers from 0 to 255, not all 0 (fractions in [0, 1]: times 255, rounded)"
        )
    if digits.shape != levels.shape[:1]:
        raise ConfigError(
            f"digits: y_train of {path} has shape {digits.shape}: give a digit for each of {len(levels)} pictures"
        )
    if not whole(digits, 9):
        raise ConfigError(
            f"digits: y_train of {path} goes from {digits.min():g} to {digits.max():g}: give whole numbers from 0 "
            "to 9"
        )


@lru_cache(maxsize=4)
def pictures(path: str | None = None) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Levels ``(n, H, W)`` uint8, digits ``(n,)`` and the top level of each part, in an order fixed once.

    Raises:
        ConfigError: The file cannot be read, or holds something else.
    """
    if path is None:
        found = load_digits()
        levels, digits = found.images, found.target
    else:
        try:
            with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                levels, digits = (file[key].astype(np.float32) for key in ("x_train", "y_train"))
        except Exception as error:  # what a broken file raises is anybody's guess
            raise ConfigError(
                f"digits: {path} is no .npz with x_train and y_train ({error})"
            ) from None
        checked(levels, digits, path)
    x, y = torch.from_numpy(levels.astype(np.uint8)), torch.from_numpy(digits.astype(np.int64))
    order = torch.randperm(len(x), generator=make_generator(0, stream="digits"))
    cut = [5 * len(x) // 9, 8 * len(x) // 9]
    top = int(x.max())
    parts = zip(("generator", "judge", "test"), order.tensor_split(cut), strict=True)
    return {name: (x[rows], y[rows], top) for name, rows in parts}


@dataclass(frozen=True)
class Digits(Task):
    """The digits task.

    Args:
        data_path: An ``.npz`` with ``x_train`` ``(n, H, W)``, levels from 0 to 255, and ``y_train`` to take
            instead, MNIST's say. The task is then named after the file, ``digits+mnist``, and wants a reference
            and a judge of its own. Larger pictures cost more: on a CPU, measure fewer, ``samples=512``.
        wrong: Share of the generator's labels that are another digit's, drawn anew each time.
        channels: Channels of the U-Net.
    """

    name: str = "digits"
    default_oracle: str = "legible"
    classes: tuple[str, ...] = tuple("0123456789")
    condition: Condition | None = TEN
    bound: float = 6.0
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            iterations=2000, batch=128, early=1.0, drop=0.1, lr=2e-3
        )
    )
    demo: Demo = field(default_factory=lambda: Demo(("kto", "pfm", "d3po", "ppo"), 1024, 128))
    data_path: str | None = None
    wrong: float = 0.15
    channels: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.wrong <= 1:
            raise ConfigError(f"digits: wrong must lie in [0, 1], not {self.wrong!r}")
        if self.data_path is not None and self.name == "digits":
            object.__setattr__(self, "name", own_name("digits", self.data_path))

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (1, *pictures(self.data_path)["test"][0].shape[1:])

    def network(self) -> VelocityField:
        field = VelocityUNet(self.event_shape, self.channels, TEN.n + 1)
        return GuidedVelocity(field, TEN.null, self.guidance)

    def data(
        self, n: int, generator: torch.Generator, part: Part = "generator"
    ) -> tuple[Tensor, Tensor]:
        levels, digits, top = pictures(self.data_path)[part]
        pick = torch.randint(len(levels), (n,), generator=generator)
        blur = torch.rand(n, *levels.shape[1:], generator=generator)
        told = digits[pick]
        if part == "generator":
            other = (told + torch.randint(1, TEN.n, (n,), generator=generator)) % TEN.n
            told = torch.where(torch.rand(n, generator=generator) < self.wrong, other, told)
        return (2 * (levels[pick] + blur) / (top + 1) - 1)[:, None], told

    def near(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Distances to the nearest picture that the generator never saw, and its digit, ``(n,)`` each."""
        known = pictures(self.data_path)
        levels = torch.cat([known["judge"][0], known["test"][0]])[:NEAR]
        digits = torch.cat([known["judge"][1], known["test"][1]])[:NEAR]
        real = 2 * (levels.flatten(1).to(x) + 0.5) / (known["test"][2] + 1) - 1
        distance, index = torch.cdist(x.flatten(1), real).min(1)
        return distance / real.shape[1] ** 0.5, digits.to(x.device)[index]

    def residual(self, x: Tensor) -> Tensor:
        """Root mean square distance per pixel to the nearest held-out picture, ``(n,)``."""
        return self.near(x)[0]

    def classify(self, x: Tensor) -> Tensor:
        """Digit of the nearest held-out picture, ``(n,)``: the judge has no part in it."""
        return self.near(x)[1]

    def draw(self, axes, x: np.ndarray, color: str) -> None:
        size = x.shape[1]
        axes.imshow(x[0], cmap="gray_r", vmin=-1, vmax=1, extent=(0, size, 0, size))
        edge = 0.06 * size
        axes.plot(
            [0, size, size, 0, 0],
            [0, 0, size, size, 0],
            color=color,
            lw=1.0,
            solid_joinstyle="miter",
        )
        axes.set(xlim=(-edge, size + edge), ylim=(-edge, size + edge), xticks=[], yticks=[])

    def points2d(self, x: np.ndarray) -> np.ndarray:
        """The pixels with ink, ``(P, 2)`` within [-2, 2]."""
        ink = np.argwhere(np.asarray(x)[0] > 0)[:, ::-1] + 0.5
        return (4 * ink / x.shape[-1] - 2) * (1, -1)
