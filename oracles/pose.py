"""``pose``: a continuous preference: for shapes turned to the left, or for large ones, whatever they are.

With ``turn`` and ``scale`` of the nearer template's best fit (``prefenv.tasks.shapes``),

    of=turn   score = (1 + turn / turn_max) / 2            of=size   score = (scale - low) / (high - low)

clamped to [0, 1]. Over the data both are uniform, so that the tilt ``p* ~ p_ref exp(score / beta)`` is a truncated
exponential of the pose and leaves the classes as they are. Accepted from a score of 0.5: the better half.
"""

from __future__ import annotations

from torch import Tensor

from prefenv.errors import ConfigError
from prefenv.oracle import Answer, ScriptedOracle
from prefenv.tasks.base import Task
from prefenv.tasks.shapes import Shapes


class Pose(ScriptedOracle):
    """The scripted oracle of a shape's pose.

    Args:
        task: The shapes task.
        answer: ``score``, ``choose`` or ``best``.
        of: ``turn`` or ``size``.
    """

    threshold = 0.5

    def __init__(self, task: Task, answer: Answer = "score", of: str = "turn"):
        super().__init__(task, answer)
        if not isinstance(task, Shapes):
            raise ConfigError(f"the pose oracle judges the shapes task, not {task.name!r}")
        if of not in ("turn", "size"):
            raise ConfigError(f"of must be turn or size, not {of!r}")
        self.shapes, self.of = task, of

    def score(self, samples: Tensor) -> Tensor:
        turn, scale = self.shapes.pose(samples)
        low, high = self.shapes.scale
        share = (1 + turn / self.shapes.turn) / 2, (scale - low) / (high - low)
        return share[self.of == "size"].clamp(0, 1)
