"""``s-curve``: prefers S curves to Swiss rolls, and clean ones to rough ones.

With ``d_S`` and ``d_R`` the Procrustes residuals to the two templates (``prefenv.tasks.shapes``), the value is

    score = d_R^2 / (d_R^2 + d_S^2)  *  1 / (1 + (d_S / width)^2)            in [0, 1]

nearness to the S curve rather than the roll, times smoothness. It is differentiable everywhere and its tail is
heavy, so a gradient leads out of a roll. A clean S curve of the data (d_S = 0.042) scores 0.92, a roll below
0.01; **a sample is accepted from a score of 0.5**, at d_S = 0.15 = ``width``, 3.5 times the data's own residual.
"""

from __future__ import annotations

from torch import Tensor

from prefenv.errors import ConfigError
from prefenv.oracle import Answer, ScriptedOracle
from prefenv.tasks.base import Task
from prefenv.tasks.shapes import ROLL, S_CURVE, Shapes


def s_score(squared: Tensor, width: float) -> Tensor:
    """The value, ``(...)``, from squared residuals to both classes, ``(..., 2)``."""
    roll, s = squared[..., ROLL], squared[..., S_CURVE]
    return roll / (roll + s) / (1 + s / width**2)


class SCurve(ScriptedOracle):
    """The scripted S-curve oracle.

    Args:
        task: The shapes task.
        answer: ``score``, ``choose`` or ``best``.
        width: Residual at which smoothness has fallen to one half.
    """

    threshold = 0.5

    def __init__(self, task: Task, answer: Answer = "score", width: float = 0.15):
        super().__init__(task, answer)
        if not isinstance(task, Shapes):
            raise ConfigError(f"the s-curve oracle judges the shapes task, not {task.name!r}")
        if width <= 0:
            raise ConfigError(f"width must be positive, not {width}")
        self.shapes = task
        self.width = width

    def score(self, samples: Tensor) -> Tensor:
        return s_score(self.shapes.residuals(samples).square(), self.width)
