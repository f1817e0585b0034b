"""``legible``: prefers digits that can be read: ``score = p(asked digit | picture)``, in [0, 1].

The probability is a LeNet's, trained on pictures that the generator never saw (``oracles/lenet.py``): the
preference of PFM's image experiment (Kim et al. 2024, arXiv 2405.20234, section 5.1). It is conditional: an
excellent 3 is worth nothing where a 5 was asked for. Accepted from 1/2.
"""

from __future__ import annotations

from torch import Tensor

from oracles.lenet import JUDGE, load
from prefenv.networks import needed
from prefenv.oracle import Answer, ScriptedOracle
from prefenv.tasks import Task


class Legible(ScriptedOracle):
    """The asked digit's probability.

    Args:
        task: The digits task.
        answer: ``score``, ``choose`` or ``best``.
        path: The judge; None = the task's own.

    Raises:
        ConfigError: Another task.
        CheckpointError: There is no such judge.
    """

    conditional = True

    def __init__(self, task: Task, answer: Answer = "score", path: str | None = None):
        super().__init__(task, answer)
        self.model = load(task, JUDGE, 10, path)

    def score(self, samples: Tensor, condition: Tensor | None = None) -> Tensor:
        asked = needed(condition).to(samples.device)
        return self.model.to(samples)(samples).softmax(1).gather(1, asked[:, None])[:, 0]
