"""``s-cloud``: prefers clouds that are S curves to Swiss rolls, and clean ones; no order of points is assumed.

With ``d_S^2`` and ``d_R^2`` half the squared Chamfer distances to the two curves (``prefenv.tasks.clouds``), it is

    score = d_R^2 / (d_R^2 + d_S^2)  *  1 / (1 + (d_S / width)^2)            in [0, 1]

as ``s-curve``'s, whose distances are Procrustes' of ordered points. It is differentiable wherever the nearest
points do not change. A cloud is accepted from a score of 0.5, just below ``d_S = width``.
"""

from __future__ import annotations

from torch import Tensor

from oracles.s_curve import s_score
from prefenv.errors import ConfigError
from prefenv.oracle import Answer, ScriptedOracle
from prefenv.tasks.base import Task
from prefenv.tasks.clouds import Clouds


class SCloud(ScriptedOracle):
    """The scripted S-cloud oracle.

    Args:
        task: The clouds task.
        answer: ``score``, ``choose`` or ``best``.
        width: Root mean square distance at which cleanness has fallen to one half.
    """

    threshold = 0.5

    def __init__(self, task: Task, answer: Answer = "score", width: float = 0.1):
        super().__init__(task, answer)
        if not isinstance(task, Clouds):
            raise ConfigError(f"the s-cloud oracle judges the clouds task, not {task.name!r}")
        if width <= 0:
            raise ConfigError(f"width must be positive, not {width}")
        self.clouds, self.width = task, width

    def score(self, samples: Tensor) -> Tensor:
        return s_score(self.clouds.residuals(samples, 2), self.width)
