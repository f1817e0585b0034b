"""``Board``: what the page shows besides the question: progress, rates, agreement, model A beside model B."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from oracles.web.agreement import agreement
from oracles.web.questions import Questions
from prefenv.device import make_generator
from prefenv.feedback import FeedbackStore
from prefenv.tasks import Task

PICTURES = 6  # noises that both models are drawn from ...
RATED = 256  # ... and whose samples are counted by class
SECONDS = 1.0  # at least so long between two pictures, and between two looks at agreement


class Board:
    """The state of a session, for the page. Threads may share it.

    Args:
        task: The task whose samples are shown.
        store: Where the answers are.
        questions: Who is asked what.
    """

    def __init__(self, task: Task, store: FeedbackStore, questions: Questions):
        self.task, self.store, self.questions = task, store, questions
        self.phase = "starting"  # then asking, learning, done
        self.progress: dict[str, Any] = {"rounds": 0, "queries": 0, "budget": None}
        self.pictures: dict[str, Any] = {
            "version": 0,
            "A": [],
            "B": [],
            "rates": {"A": {}, "B": {}},
        }
        self.extent = 0.0  # largest coordinate seen, so that all samples are drawn to one scale
        self._lock, self._began, self._drawn = threading.Lock(), time.time(), 0.0
        self._agreement: tuple[int, float, dict[str, Any]] = (-1, 0.0, {})

    def points(self, x: np.ndarray) -> list[list[float]]:
        """A sample ``(*event_shape,)`` as points of the plane, rounded for the wire."""
        points = np.asarray(self.task.points2d(x), dtype=float)
        self.extent = max(self.extent, float(np.abs(points).max(initial=0.0)))
        return points.round(3).tolist()

    @torch.no_grad()
    def publish(self, agent: Any, *, last: bool = False) -> None:
        """Show how far an agent is; ``last`` draws in any case, else not more than once in ``SECONDS``."""
        ledger = agent.env.ledger
        self.progress = {
            "rounds": agent.rounds,
            "queries": ledger.queries,
            "budget": ledger.max_queries,
        }
        now = time.monotonic()
        if not last and now - self._drawn < SECONDS:
            return
        self._drawn = now
        shape = (RATED, *self.task.event_shape)
        noise = torch.randn(shape, generator=make_generator(agent.seed, stream="pictures"))
        drawn: dict[str, Any] = {"version": self.pictures["version"] + 1, "rates": {}}
        for name, model in (("A", agent.env.reference), ("B", agent)):
            x = model.sample(noise.to(agent.device)).cpu()
            drawn[name] = [self.points(p) for p in x[:PICTURES].numpy()]
            drawn["rates"][name] = self.rates(x)
        self.pictures = drawn

    def rates(self, x: torch.Tensor) -> dict[str, float]:
        """Share of each class in samples ``(n, *event_shape)``."""
        classes = self.task.classes
        counts = torch.bincount(self.task.classify(x), minlength=len(classes)) if classes else []
        return {name: float(n) / len(x) for name, n in zip(classes, counts, strict=True)}

    def state(self, annotator: str, seen: int = 0) -> dict[str, Any]:
        """The state for one annotator; pictures only where they are newer than version ``seen``."""
        with self.questions.changed:
            mine = list(self.questions.standing.get(annotator, {}).values())
            everybody = sum(map(len, self.questions.standing.values()))
            left = len(self.questions.open)
        now = time.time()
        recent = [j.time for j in mine if j.time > max(now - 600, self._began)]
        scores = [s for j in mine for s in j.scores if s is not None]
        return {
            "phase": self.phase,
            **self.progress,
            "open": left,
            "mine": len(mine),
            "everybody": everybody,
            "per_minute": 60 * len(recent) / max(10.0, now - recent[0]) if recent else None,
            "chosen_rate": sum(scores) / len(scores) if scores else None,
            "agreement": self.agreement(everybody),
            "extent": self.extent,
            "pictures": self.pictures if self.pictures["version"] != seen else None,
        }

    def agreement(self, count: int) -> dict[str, Any]:
        """The agreement so far, looked at anew where answers came, but not all the time."""
        with self._lock:
            known, since, value = self._agreement
            if (known != count and time.monotonic() - since > SECONDS) or not value:
                value = asdict(agreement(self.store.judgements()))
                self._agreement = (count, time.monotonic(), value)
            return value
