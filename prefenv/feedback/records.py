"""What feedback is made of: samples, panels, judgements, retractions, and their names."""

from __future__ import annotations

import hashlib
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefenv.errors import FeedbackError


def sample_id(x: Any) -> str:
    """The name of a sample ``(*event_shape,)``: 16 hex digits of the SHA-256 of its float32 values and shape."""
    values = float_array(x)
    return hashlib.sha256(f"{values.shape}".encode() + values.tobytes()).hexdigest()[:16]


def model_hash(model: torch.nn.Module) -> str:
    """The name of a model: 16 hex digits of the SHA-256 of its weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def float_array(x: Any) -> np.ndarray:
    """Little-endian float32, in C order."""
    values = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
    return np.ascontiguousarray(values, dtype="<f4")


@dataclass(frozen=True, eq=False)
class Sample:
    """A finished sample and where it came from.

    Args:
        x: The sample, ``(*event_shape,)`` float32.
        noise: The noise it was made from, of the same shape.
        path: All states from noise to sample, ``(steps + 1, *event_shape)``.
        log_prob: Log-probability of each step, ``(steps,)``.
        task: The task's name.
        model: ``model_hash`` of the model that made it.
        condition: The prompt, or the condition's number.
        seed: Seed of the noise.
        info: What else is worth keeping, as JSON values (steps, kernel, ...).
    """

    x: np.ndarray
    noise: np.ndarray | None = None
    path: np.ndarray | None = None
    log_prob: np.ndarray | None = None
    task: str | None = None
    model: str | None = None
    condition: str | None = None
    seed: int | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("x", "noise", "path", "log_prob"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, float_array(value))
        if not np.isfinite(self.x).all():
            raise FeedbackError("a sample must be finite")
        shape = self.x.shape
        if self.noise is not None and self.noise.shape != shape:
            raise FeedbackError(f"the noise of a sample {shape} has shape {self.noise.shape}")
        if self.path is not None and self.path.shape[1:] != shape:
            raise FeedbackError(f"the path of a sample {shape} has shape {self.path.shape}")

    @property
    def id(self) -> str:
        """``sample_id`` of ``x``."""
        return sample_id(self.x)


@dataclass(frozen=True)
class Panel:
    """One question: the ids of the samples shown together; in another order it is the same panel."""

    samples: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", tuple(self.samples))
        if not self.samples:
            raise FeedbackError("a panel has at least one sample")

    @property
    def id(self) -> str:
        """16 hex digits, whatever the order."""
        return hashlib.sha256(" ".join(sorted(self.samples)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Judgement:
    """One answer to a panel.

    Args:
        samples: Ids in the order in which they were shown.
        scores: One number for each, None = no answer.
        annotator: Who answered.
        seconds: Time to answer.
        id: Its name; the same id is kept once, so a client may send an answer again.
        time: When, in seconds since 1970.
    """

    samples: tuple[str, ...]
    scores: tuple[float | None, ...]
    annotator: str = ""
    seconds: float | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    time: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        scores = tuple(None if s is None or s != s else float(s) for s in self.scores)
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "samples", tuple(self.samples))
        if len(scores) != len(self.samples):
            raise FeedbackError(f"{len(scores)} scores for {len(self.samples)} samples")
        if any(s is not None and math.isinf(s) for s in scores):
            raise FeedbackError("scores are finite, or None for no answer")

    @property
    def panel(self) -> str:
        """Id of the panel that it answers."""
        return Panel(self.samples).id


@dataclass(frozen=True)
class Retraction:
    """Takes a judgement back.

    Args:
        judgement: Its id.
        annotator: Who took it back.
        id: The retraction's own name.
        time: When, in seconds since 1970.
    """

    judgement: str
    annotator: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    time: float = field(default_factory=time.time)


def mean_scores(panel: Panel, judgements: Sequence[Judgement]) -> dict[str, float | None]:
    """Scores of a panel's samples, averaged over the judgements that gave one."""
    told: dict[str, list[float]] = {name: [] for name in panel.samples}
    for judgement in judgements:
        for name, score in zip(judgement.samples, judgement.scores, strict=True):
            if score is not None:
                told[name].append(score)
    return {name: math.fsum(s) / len(s) if s else None for name, s in told.items()}
