"""The feedback store: questions and answers about samples in one SQLite file, where no answer is ever lost.

A **sample** is known by its content (``sample_id``), a **panel** by its samples. A **judgement** is one answer to
a panel: a score for each sample *in the order in which they were shown*, None = no answer; so a choice is 1 and 0,
a tie is equal scores, a rating is a panel of one, and all None is a skip. Nothing is deleted: ``undo`` adds a
**retraction**, and ``history`` shows both.

``answer`` and ``undo`` are one commit each. When they return, it is on the disk: a process that is killed at any
moment leaves every answer it acknowledged, and no half of another. So acknowledge after they return::

    with FeedbackStore("runs/mine/feedback.sqlite") as store:
        panels = store.ask(x, noise=noise, model=model_hash(flow))      # x: (m, K, *event_shape)
        for panel in store.waiting("ann"):                              # those that ann has not answered
            shown = shuffled(panel.samples)                             # ids; store.sample(id).x is the array
            store.answer(Judgement(shown, (0.0, 1.0), annotator="ann", seconds=2.5))
        store.undo("ann")                                               # retracts ann's last answer that stands
        scores, known = store.recall(x)                                 # (m, K), NaN = none; (m,) bool

One store may be shared by threads, and its file by processes (SQLite's write-ahead log). An answer sent twice
under one ``id`` is kept once. Samples are found by their bits, so by the same device and versions that made them.
"""

from prefenv.feedback.records import (
    Judgement,
    Panel,
    Retraction,
    Sample,
    mean_scores,
    model_hash,
    sample_id,
)
from prefenv.feedback.store import FeedbackStore

__all__ = [
    "FeedbackStore",
    "Judgement",
    "Panel",
    "Retraction",
    "Sample",
    "mean_scores",
    "model_hash",
    "sample_id",
]
