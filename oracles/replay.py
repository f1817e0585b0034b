"""``replay``: answers from a feedback file what was answered before: a person's run again, without the person.

A panel is found by the content of its samples, in any order (``prefenv.feedback``): the answer is each annotator's
first one that stands, averaged. Panels that nobody answered are not answered. The same seed, settings and versions
propose the same samples bit by bit, so a run that was stopped goes on, and one that is repeated comes out alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import Tensor

from prefenv.errors import ConfigError, FeedbackError
from prefenv.feedback import FeedbackStore
from prefenv.oracle import Oracle
from prefenv.tasks import Task


class Replay(Oracle):
    """Answers from a feedback file, which it never changes.

    Args:
        task: The task whose samples were judged.
        path: The feedback file.
        missing: What to do about a panel that nobody answered: ``skip`` = no answer; ``error`` = stop.

    Raises:
        FeedbackError: The file is missing or no feedback file.
    """

    def __init__(self, task: Task, path: str, missing: Literal["skip", "error"] = "skip"):
        super().__init__(task)
        if missing not in ("skip", "error"):
            raise ConfigError(f"replay: missing must be skip or error, not {missing!r}")
        self.path, self.missing = Path(path), missing
        FeedbackStore(self.path, readonly=True).close()

    def judge(self, panels: Tensor) -> Tensor:
        """Judge panels ``(m, K, *event_shape)``.

        Raises:
            FeedbackError: With ``missing="error"``, a panel that nobody answered.
        """
        with FeedbackStore(self.path, readonly=True) as store:
            scores, known = store.recall(panels)
        if self.missing == "error" and not bool(known.all()):
            raise FeedbackError(
                f"{self.path} has no answer to {int((~known).sum())} of {len(known)} panels: was it made with the "
                "same seed, settings and device?"
            )
        return scores
