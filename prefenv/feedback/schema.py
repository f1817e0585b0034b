"""The tables of a feedback file, and how records are their rows."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from prefenv.feedback.records import Judgement, Retraction, Sample

VERSION = 1
APPLICATION = 0x70726566  # "pref": tells our files from other SQLite files
SCHEMA = """
CREATE TABLE sample (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, shape TEXT NOT NULL, x BLOB NOT NULL, noise BLOB,
    path BLOB, log_prob BLOB, task TEXT, model TEXT, condition TEXT, seed INTEGER, info TEXT NOT NULL
);
CREATE TABLE panel (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, samples TEXT NOT NULL);
CREATE TABLE event (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, time REAL NOT NULL, annotator TEXT NOT NULL,
    panel TEXT REFERENCES panel (id), shown TEXT, scores TEXT, seconds REAL,
    retracts TEXT UNIQUE REFERENCES event (id),
    CHECK ((retracts IS NULL) = (panel IS NOT NULL AND shown IS NOT NULL AND scores IS NOT NULL))
);
CREATE INDEX event_panel ON event (panel);
"""
STANDING = "FROM event e WHERE panel IS NOT NULL AND NOT EXISTS (SELECT 1 FROM event r WHERE r.retracts = e.id)"
SAMPLE = (
    *("id", "shape", "x", "noise", "path", "log_prob"),
    *("task", "model", "condition", "seed", "info"),
)
EVENT = "id, time, annotator, panel, shown, scores, seconds, retracts"


def sample_row(s: Sample) -> tuple[Any, ...]:
    """A sample as the columns ``SAMPLE``."""
    arrays = (None if a is None else a.tobytes() for a in (s.x, s.noise, s.path, s.log_prob))
    plain = (s.task, s.model, s.condition, s.seed, json.dumps(s.info))
    return (s.id, json.dumps(s.x.shape), *arrays, *plain)


def sample_of(row: tuple[Any, ...]) -> Sample:
    """The sample of the columns ``SAMPLE``."""
    shape = tuple(json.loads(row[1]))

    def array(data: bytes | None, *shape: int) -> np.ndarray | None:
        return None if data is None else np.frombuffer(data, "<f4").reshape(shape)

    noise, path, log_prob = array(row[3], *shape), array(row[4], -1, *shape), array(row[5], -1)
    x = np.frombuffer(row[2], "<f4").reshape(shape)
    return Sample(x, noise, path, log_prob, *row[6:10], json.loads(row[10]))


def judgement_of(row: tuple[Any, ...]) -> Judgement:
    """The judgement of the columns ``EVENT``."""
    shown, scores = tuple(json.loads(row[4])), tuple(json.loads(row[5]))
    return Judgement(shown, scores, row[2], row[6], row[0], row[1])


def event_of(row: tuple[Any, ...]) -> Judgement | Retraction:
    """The judgement or retraction of the columns ``EVENT``."""
    return Retraction(row[7], row[2], row[0], row[1]) if row[7] else judgement_of(row)
