"""``learned``: a reward model that was trained on somebody's answers (``prefenv train-reward``) answers for them.

The value of a sample is ``sigmoid(a mean_e r_e(x) + b)`` in [0, 1], ``r_e`` a Bradley-Terry ensemble
(``prefenv/reward.py``), accepted from 1/2. It is differentiable, so it serves every agent: D3PO's reward-model
mode (Yang et al. 2023, arXiv 2311.13231). ``caution`` subtracts so many standard deviations of the ensemble from
its mean, which keeps an agent from where the members guess (Coste et al. 2023, arXiv 2310.02743).
"""

from __future__ import annotations

from torch import Tensor

from prefenv.checkpoints import find
from prefenv.errors import CheckpointError, ConfigError
from prefenv.oracle import Oracle
from prefenv.reward import load_reward
from prefenv.tasks import Task


class Learned(Oracle):
    """A reward model as an oracle.

    Args:
        task: The task whose samples it judges.
        path: The reward model: a .safetensors file, or the name of one of ours, ``shapes-proxy``.
        caution: Standard deviations of the ensemble that are taken off its mean.

    Raises:
        CheckpointError: The file is missing, broken, or for samples of another shape.
    """

    differentiable = True
    unconditional = True

    def __init__(self, task: Task, path: str, caution: float = 0.0):
        super().__init__(task)
        if not 0 <= caution < float("inf"):
            raise ConfigError(f"learned: caution must be finite and at least 0, not {caution}")
        self.model, self.card = load_reward(find(path))
        self.caution = caution
        if self.model.event_shape != task.event_shape:
            raise CheckpointError(
                f"{path} judges samples of shape {self.model.event_shape}, {task.name} has {task.event_shape}"
            )

    def judge(self, panels: Tensor) -> Tensor:
        samples = panels.flatten(0, 1)
        return self.model.to(samples).value(samples, self.caution).view(panels.shape[:2])
