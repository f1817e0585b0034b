"""``aesthetic``: prefers what looks like a real hand's: a learned proxy, ``score = p(real | picture)``, in [0, 1].

D3PO and DDPO take a network's opinion of a picture for one of their objectives (LAION's aesthetic predictor).
Nobody has rated these digits, so the proxy is what can be learned without ratings: a LeNet that tells real
pictures from model A's (``oracles/lenet.py``). It does not ask which digit it is. Accepted from 1/2.
"""

from __future__ import annotations

from torch import Tensor

from oracles.lenet import AESTHETIC, load
from prefenv.oracle import Answer, ScriptedOracle
from prefenv.tasks import Task


class Aesthetic(ScriptedOracle):
    """The probability that a picture is a real one.

    Args:
        task: The digits task.
        answer: ``score``, ``choose`` or ``best``.
        path: The network; None = the task's own.

    Raises:
        ConfigError: Another task.
        CheckpointError: There is no such network.
    """

    def __init__(self, task: Task, answer: Answer = "score", path: str | None = None):
        super().__init__(task, answer)
        self.model = load(task, AESTHETIC, 1, path)

    def score(self, samples: Tensor) -> Tensor:
        return self.model.to(samples)(samples)[:, 0].sigmoid()
