"""``FeedbackStore``: the SQLite file. How it is used: ``prefenv.feedback``."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefenv.errors import FeedbackError
from prefenv.feedback.records import (
    Judgement,
    Panel,
    Retraction,
    Sample,
    float_array,
    mean_scores,
    sample_id,
)
from prefenv.feedback.schema import (
    APPLICATION,
    EVENT,
    SAMPLE,
    SCHEMA,
    STANDING,
    VERSION,
    event_of,
    judgement_of,
    sample_of,
    sample_row,
)


class FeedbackStore:
    """A feedback file; made if it is missing.

    Args:
        path: The SQLite file.
        readonly: Open an existing file, and never write to it.

    Raises:
        FeedbackError: It cannot be opened, or is no feedback file of this version.
    """

    def __init__(self, path: str | Path, *, readonly: bool = False):
        self.path, self._lock = Path(path), threading.RLock()
        if readonly and not self.path.is_file():
            raise FeedbackError(f"no feedback file at {path}")
        try:
            if not readonly:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            uri = f"{self.path.resolve().as_uri()}?mode={'ro' if readonly else 'rwc'}"
            self._db = sqlite3.connect(
                uri, uri=True, timeout=30, isolation_level=None, check_same_thread=False
            )
            self._open(readonly)
        except (sqlite3.Error, OSError) as error:
            raise FeedbackError(f"cannot open {path} as a feedback file: {error}") from None

    def _open(self, readonly: bool) -> None:
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.execute("PRAGMA synchronous = FULL")  # also through a power cut, not only a kill
        if not readonly:
            if self._one("PRAGMA journal_mode")[0] != "wal":
                self._db.execute("PRAGMA journal_mode = WAL")
            with self._commit():
                if not self._one("SELECT COUNT(*) FROM sqlite_master")[0]:
                    for statement in SCHEMA.split(";\n"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA application_id = {APPLICATION}")
                    self._db.execute(f"PRAGMA user_version = {VERSION}")
        found = self._one("PRAGMA application_id")[0], self._one("PRAGMA user_version")[0]
        if found != (APPLICATION, VERSION):
            self.close()
            kind = f"version {found[1]}" if found[0] == APPLICATION else "another program's file"
            raise FeedbackError(f"{self.path} is {kind}, not feedback of version {VERSION}")

    def __enter__(self) -> FeedbackStore:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was answered stays."""
        self._db.close()

    @contextmanager
    def _commit(self) -> Generator[None, None, None]:
        """One transaction, whole or not at all."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            except BaseException as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise FeedbackError(f"cannot write to {self.path}: {error}") from error
                raise

    def _all(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def _one(self, query: str, *values: Any) -> Any:
        return next(iter(self._all(query, *values)), None)

    # Questions.

    def ask(
        self, x: Any, noise: Any = None, path: Any = None, log_prob: Any = None, **origin: Any
    ) -> list[Panel]:
        """Put panels of samples as questions; what is known already is not put twice.

        Args:
            x: Samples ``(m, K, *event_shape)``.
            noise: Their noises, of the same shape.
            path: Their paths, ``(m, K, steps + 1, *event_shape)``.
            log_prob: Log-probabilities of their steps, ``(m, K, steps)``.
            origin: ``task``, ``model``, ``condition``, ``seed`` and ``info`` of them all, as in ``Sample``; a list
                of conditions has one for each panel.
        """
        arrays = {"x": x, "noise": noise, "path": path, "log_prob": log_prob}
        given = {k: float_array(v) for k, v in arrays.items() if v is not None}
        m, k = given["x"].shape[:2]
        asked = origin.pop("condition", None)
        each = asked if isinstance(asked, list) else [asked] * m
        rows = [
            [
                Sample(**{n: v[i, j] for n, v in given.items()}, condition=each[i], **origin)
                for j in range(k)
            ]
            for i in range(m)
        ]
        panels = [Panel(tuple(s.id for s in row)) for row in rows]
        self.put([s for row in rows for s in row], panels)
        return panels

    def put(self, samples: Iterable[Sample], panels: Iterable[Panel] = ()) -> None:
        """Add samples and questions, all in one commit; what is known already stays as it is."""
        rows = [sample_row(s) for s in samples]
        with self._commit():
            marks = ", ".join("?" * len(SAMPLE))
            self._db.executemany(
                f"INSERT OR IGNORE INTO sample ({', '.join(SAMPLE)}) VALUES ({marks})", rows
            )
            for panel in panels:
                self._put_panel(panel)

    def _put_panel(self, panel: Panel) -> None:
        for name in panel.samples:
            if self._one("SELECT 1 FROM sample WHERE id = ?", name) is None:
                raise FeedbackError(f"{self.path} knows no sample {name!r}: put it first")
        self._db.execute(
            "INSERT OR IGNORE INTO panel (id, samples) VALUES (?, ?)",
            (panel.id, json.dumps(panel.samples)),
        )

    # Answers.

    def answer(self, judgement: Judgement) -> None:
        """Keep an answer. When this returns, it is on the disk.

        Raises:
            FeedbackError: A sample that the store does not know, or the file cannot be written.
        """
        self.record([judgement])

    def undo(self, annotator: str = "") -> Judgement | None:
        """Retract the annotator's last answer that stands; returns it, or None where none is left."""
        with self._commit():
            row = self._one(
                f"SELECT {EVENT} {STANDING} AND annotator = ? ORDER BY number DESC LIMIT 1",
                annotator,
            )
            if row is None:
                return None
            self._put_event(Retraction(row[0], annotator))
        return judgement_of(row)

    def record(self, events: Iterable[Judgement | Retraction]) -> None:
        """Keep judgements and retractions in their order, all in one commit; a known id is kept once.

        Raises:
            FeedbackError: A sample or judgement that the store does not know; nothing is kept.
        """
        with self._commit():
            for event in events:
                self._put_event(event)

    def _put_event(self, event: Judgement | Retraction) -> None:
        if self._one("SELECT 1 FROM event WHERE id = ?", event.id) is not None:
            return
        if isinstance(event, Judgement):
            self._put_panel(Panel(event.samples))
            shown, scores = json.dumps(event.samples), json.dumps(event.scores)
            values = (event.panel, shown, scores, event.seconds, None)
        else:
            values = (None, None, None, None, event.judgement)
        self._db.execute(
            f"INSERT INTO event ({EVENT}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (event.id, event.time, event.annotator, *values),
        )

    # Reading.

    def sample(self, name: str) -> Sample:
        """The sample of an id.

        Raises:
            FeedbackError: It is not known.
        """
        row = self._one(f"SELECT {', '.join(SAMPLE)} FROM sample WHERE id = ?", name)
        if row is None:
            raise FeedbackError(f"{self.path} knows no sample {name!r}")
        return sample_of(row)

    def samples(self) -> list[Sample]:
        """All samples, in the order in which they came."""
        return [
            sample_of(r)
            for r in self._all(f"SELECT {', '.join(SAMPLE)} FROM sample ORDER BY number")
        ]

    def panels(self) -> list[Panel]:
        """All questions, in the order in which they were put."""
        return [
            Panel(tuple(json.loads(s)))
            for (s,) in self._all("SELECT samples FROM panel ORDER BY number")
        ]

    def waiting(self, annotator: str = "") -> list[Panel]:
        """Questions to which no answer of this annotator stands (a skip is an answer), in order."""
        rows = self._all(
            "SELECT samples FROM panel p WHERE NOT EXISTS "
            f"(SELECT 1 {STANDING} AND e.panel = p.id AND e.annotator = ?) ORDER BY number",
            annotator,
        )
        return [Panel(tuple(json.loads(s))) for (s,) in rows]

    def judgements(self, annotator: str | None = None) -> list[Judgement]:
        """The answers that stand, in order; of one annotator, or (None) of all."""
        rows = self._all(f"SELECT {EVENT} {STANDING} ORDER BY number")
        found = [judgement_of(r) for r in rows]
        return [j for j in found if annotator in (None, j.annotator)]

    def history(self) -> list[Judgement | Retraction]:
        """All that happened, in order: answers, and the retractions that took some of them back."""
        rows = self._all(f"SELECT {EVENT} FROM event ORDER BY number")
        return [event_of(r) for r in rows]

    def recall(self, panels: Tensor) -> tuple[Tensor, Tensor]:
        """What was answered to panels ``(m, K, *event_shape)``, in whatever order they were shown.

        Returns:
            Scores ``(m, K)`` float32, NaN = no answer: each annotator's first one that stands, averaged over those
            who gave one. A later one tells self-consistency; who changes their mind takes the first back. And
            ``(m,)`` bool: whether anybody answered at all, if only by a skip.
        """
        ids = [[sample_id(x) for x in panel] for panel in panels.cpu()]
        answers = [self.scores(Panel(tuple(row))) for row in ids]
        scores = [
            [float("nan") if a is None or a[i] is None else a[i] for i in row]
            for a, row in zip(answers, ids, strict=True)
        ]
        known = torch.tensor([a is not None for a in answers], device=panels.device)
        return torch.tensor(scores, device=panels.device), known

    def scores(self, panel: Panel) -> dict[str, float | None] | None:
        """The answers to one panel by sample, averaged over annotators; None where nobody answered."""
        rows = self._all(f"SELECT {EVENT} {STANDING} AND panel = ? ORDER BY number", panel.id)
        first = {j.annotator: j for j in map(judgement_of, reversed(rows))}
        return mean_scores(panel, list(first.values())) if first else None
