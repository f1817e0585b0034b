"""Feedback as JSONL: one JSON object a line, nothing lost on the way there and back.

The first line is ``{"kind": "feedback", "version": 1}``. Then come, in the order in which they came to be, lines
of the kinds ``sample`` (arrays as nested lists of numbers that are exact in float32), ``panel`` (``samples`` are
ids), ``judgement`` (``samples`` in the order shown; ``scores``, null = no answer) and ``retraction``; their other
keys are the fields of ``prefenv.feedback.records``. A line that is not valid is refused with its number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prefenv.checkpoints import write_atomic
from prefenv.errors import FeedbackError
from prefenv.feedback.records import Judgement, Panel, Retraction, Sample, mean_scores
from prefenv.feedback.store import FeedbackStore

VERSION = 1
Event = Judgement | Retraction
KINDS: dict[str, Any] = {
    "sample": Sample,
    "panel": Panel,
    "judgement": Judgement,
    "retraction": Retraction,
}
_ARRAYS = ("x", "noise", "path", "log_prob")
_TEXTS = ("id", "annotator", "judgement", "task", "model", "condition")


@dataclass
class Feedback:
    """The whole content of a feedback file.

    Args:
        samples: All samples, in order.
        panels: All questions, in order.
        events: All judgements and retractions, in order.
    """

    samples: list[Sample] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def judgements(self) -> list[Judgement]:
        """The answers that stand, in order."""
        gone = {e.judgement for e in self.events if isinstance(e, Retraction)}
        return [e for e in self.events if isinstance(e, Judgement) and e.id not in gone]

    def answers(self) -> list[tuple[Panel, dict[str, float | None]]]:
        """The panels to which an answer stands, and their scores: each annotator's last ones, averaged."""
        last: dict[str, dict[str, Judgement]] = {}
        for judgement in self.judgements():
            last.setdefault(judgement.panel, {})[judgement.annotator] = judgement
        told = [Panel(next(iter(by.values())).samples) for by in last.values()]
        return [(p, mean_scores(p, list(last[p.id].values()))) for p in told]

    def digest(self) -> str:
        """16 hex digits that change with every answer."""
        said = [(p.samples, tuple(scores.values())) for p, scores in self.answers()]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def dump(store: FeedbackStore) -> Feedback:
    """What a store holds."""
    return Feedback(store.samples(), store.panels(), store.history())


def load(store: FeedbackStore, feedback: Feedback) -> None:
    """Add feedback to a store; what it knows already stays as it is."""
    store.put(feedback.samples, feedback.panels)
    store.record(feedback.events)


def find(path: str | Path) -> Path:
    """The feedback file that a file or folder names: itself, or ``feedback.sqlite`` in the folder.

    Raises:
        FeedbackError: There is none.
    """
    path = Path(path)
    found = path / "feedback.sqlite" if path.is_dir() else path
    if not found.is_file():
        raise FeedbackError(f"no feedback file at {found}")
    return found


def read_feedback(path: str | Path) -> Feedback:
    """The content of a feedback file (SQLite, or ``.jsonl``) or of the folder it lies in.

    Raises:
        FeedbackError: It is missing or not valid.
    """
    found = find(path)
    if found.suffix == ".jsonl":
        return read_jsonl(found)
    with FeedbackStore(found, readonly=True) as store:
        return dump(store)


def write_jsonl(feedback: Feedback, path: str | Path) -> None:
    """Write feedback as JSONL, whole or not at all."""
    lines = [{"kind": "feedback", "version": VERSION}, *_lines(feedback)]
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    write_atomic(Path(path), text.encode())


def _lines(feedback: Feedback) -> Iterator[dict[str, Any]]:
    for record in (*feedback.samples, *feedback.panels, *feedback.events):
        kind = next(k for k, cls in KINDS.items() if isinstance(record, cls))
        values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
        for name in _ARRAYS:
            if values.get(name) is not None:
                values[name] = _numbers(values[name])
        named = {"id": record.id} if isinstance(record, Sample) else {}
        yield {"kind": kind, **named, **{k: v for k, v in values.items() if v is not None}}


def _numbers(values: np.ndarray) -> Any:
    """Nested lists of the shortest decimal numbers that are these float32 numbers."""
    return np.array([float(str(v)) for v in values.ravel()]).reshape(values.shape).tolist()


def read_jsonl(path: str | Path) -> Feedback:
    """Feedback from JSONL.

    Raises:
        FeedbackError: It cannot be read, or a line is not valid; the message names the line.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FeedbackError(f"cannot read {path}: {error}") from None
    feedback, known, given = Feedback(), set(), set()
    lists = {Sample: feedback.samples, Panel: feedback.panels}
    for number, line in enumerate(lines, 1):
        try:
            record = _record(json.loads(line), number)
            if record is None:
                continue
            lists.get(type(record), feedback.events).append(record)
            if isinstance(record, Sample):
                known.add(record.id)
            elif isinstance(record, Retraction):
                _need(record.judgement in given, f"no judgement {record.judgement!r} before it")
            else:
                strange = [s for s in record.samples if s not in known]
                _need(not strange, f"no sample {strange[:1]} before it")
                given.add(record.id)
        except (ValueError, TypeError, KeyError, AttributeError, FeedbackError) as error:
            raise FeedbackError(f"{path}, line {number}: {error}") from None
    _need(lines, f"{path} is empty")
    return feedback


def _record(values: Any, number: int) -> Any:
    """The record of a line; None for the first line, which says what the file is."""
    _need(isinstance(values, dict), "not a JSON object")
    kind = values.pop("kind", None)
    if number == 1:
        _need(kind == "feedback", 'the first line must be {"kind": "feedback", "version": 1}')
        version = values.get("version")
        _need(version == VERSION, f"version {version!r}; this prefenv reads {VERSION}")
        return None
    _need(kind in KINDS, f"unknown kind {kind!r}; one of {', '.join(KINDS)}")
    cls = KINDS[kind]
    name = values.pop("id", None) if cls is Sample else None
    fields = {f.name for f in dataclasses.fields(cls)}
    _need(values.keys() <= fields, f"unknown keys of a {kind}: {sorted(values.keys() - fields)}")
    for key in _TEXTS:
        _need(isinstance(values.get(key, ""), str), f"{key} must be a text")
    for key in ("samples", "scores"):
        _need(isinstance(values.get(key, []), list), f"{key} must be a list")
    record = cls(**values)
    _need(name is None or record.id == name, f"sample {name} has another content: {cls.__name__}")
    return record


def _need(holds: Any, message: str) -> None:
    if not holds:
        raise FeedbackError(message)
