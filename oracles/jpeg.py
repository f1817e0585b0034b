"""``jpeg``: prefers pictures that take few bytes as JPEG, or many: D3PO's compressibility and incompressibility.

    score = sigmoid((mean - bytes) / std)            (``prefer="large"``: the other sign)

``bytes`` is the file's size at a quality, by Pillow, as in DDPO's and D3PO's rewards (2305.13301, 2311.13231);
``mean`` and ``std`` are those of the real pictures that the generator never saw, so that a real one is worth about
1/2. Accepted from 0.78: better than nine real ones in ten, were they Gaussian. It has no gradient.
"""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prefenv.device import make_generator
from prefenv.errors import ConfigError
from prefenv.oracle import Answer, ScriptedOracle
from prefenv.tasks import Task
from prefenv.tasks.digits import Digits


def jpeg_bytes(samples: Tensor, quality: int) -> Tensor:
    """Size of each picture ``(n, 1, H, W)``, ink from -1 to 1, as a grey JPEG file, ``(n,)`` float32."""
    level = ((samples.detach().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    sizes = []
    for picture in level[:, 0].numpy():
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(picture)).save(file, "JPEG", quality=quality)
        sizes.append(float(file.tell()))
    return torch.tensor(sizes)


class Jpeg(ScriptedOracle):
    """The size of a picture's JPEG.

    Args:
        task: The digits task.
        answer: ``score``, ``choose`` or ``best``.
        prefer: ``small`` or ``large`` files.
        quality: Of the JPEG, 1 to 95.

    Raises:
        ConfigError: Another task, or a setting out of range.
    """

    threshold = 0.78

    def __init__(
        self,
        task: Task,
        answer: Answer = "score",
        prefer: Literal["small", "large"] = "small",
        quality: int = 90,
    ):
        super().__init__(task, answer)
        self.differentiable = False
        if not isinstance(task, Digits):
            raise ConfigError(f"the jpeg oracle looks at digits, not at {task.name!r}")
        if prefer not in ("small", "large") or not 1 <= quality <= 95:
            raise ConfigError(
                f"jpeg: prefer is small or large, quality 1 to 95, not {prefer!r} and {quality!r}"
            )
        self.sign, self.quality = (-1.0 if prefer == "small" else 1.0), quality
        real, _ = task.data(1000, make_generator(0, stream="jpeg"), "judge")
        sizes = jpeg_bytes(real, quality)
        self.mean, self.std = float(sizes.mean()), float(sizes.std())

    def score(self, samples: Tensor) -> Tensor:
        gap = (jpeg_bytes(samples, self.quality) - self.mean) / self.std
        return (self.sign * gap).sigmoid().to(samples.device)
