"""``two-modes``: prefers two opposite modes of the ``gaussians`` task, a large and a small one.

    score(x) = max_k a_k / (1 + (d_k / width)^4)                                    in [0, 1]

with ``d_k`` the distance to the preferred mode k and ``a_k`` its value. It is nearly flat inside a mode, and has a
tail that a gradient can follow. **Accepted from 0.5**, which is at
``width``: 3 standard deviations of the data by default. With equal values the optimum keeps the masses of the two
as they are in the reference, 3 to 1: an agent that forgets the small one has lost a quarter of what is preferred.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefenv.errors import ConfigError
from prefenv.oracle import Answer, ScriptedOracle
from prefenv.tasks.base import Task
from prefenv.tasks.gaussians import MODES, Gaussians


class TwoModes(ScriptedOracle):
    """The oracle that prefers some modes.

    Args:
        task: The gaussians task.
        answer: ``score``, ``choose`` or ``best``.
        modes: Which modes are preferred, counter-clockwise from the east.
        values: What a sample at the centre of each is worth, in (0, 1].
        width: Distance from the centre at which that has fallen to one half.
    """

    threshold = 0.5

    def __init__(
        self,
        task: Task,
        answer: Answer = "score",
        modes: tuple[int, ...] = (1, 5),
        values: tuple[float, ...] = (1.0, 1.0),
        width: float = 0.6,
    ):
        super().__init__(task, answer)
        if not isinstance(task, Gaussians):
            raise ConfigError(f"the two-modes oracle judges the gaussians task, not {task.name!r}")
        if not modes or len(modes) != len(values) or not set(modes) <= set(range(MODES)):
            raise ConfigError(f"two-modes: {modes!r} are no modes from 0 to 7 with a value each")
        if not all(0 < v <= 1 for v in values) or width <= 0:
            raise ConfigError("two-modes: values lie in (0, 1] and width is positive")
        self.modes, self.values, self.width = list(modes), values, width
        self.gaussians = task

    def score(self, samples: Tensor) -> Tensor:
        offset = samples[..., None, :] - self.gaussians.centres.to(samples)[self.modes]
        fourth = (offset.square().sum(-1) / self.width**2).square()
        return (torch.tensor(self.values).to(samples) / (1 + fourth)).amax(-1)
