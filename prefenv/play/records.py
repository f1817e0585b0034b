"""What an episode is made of: its settings, a question, and what came of an answer."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from prefenv.agent import Metrics
from prefenv.checkpoints import write_atomic
from prefenv.errors import ConfigError, RunError
from prefenv.registry import agent_config
from prefenv.runs import versions, writable


@dataclass(frozen=True)
class PlayConfig:
    """Everything that decides an episode, next to the answers.

    Args:
        agent: Agent, by name; settings may follow, ``hil-dd:lr=1e-3``. The default needs the fewest answers.
        task: Task, by name; settings may follow.
        panel_size: Proposals shown together.
        shown: Samples of model A shown in the beginning, and of model B after each answer.
        seed: Seed of everything random.
        steps: Steps from noise to sample.
        checkpoint: Reference: a file, or the name of one of ours; None = the task's own.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        none_teaches: Let the agent learn from "none will do" too; the toy does not.
        annotator: Who answers; kept with every answer.
    """

    agent: str = "learned-reward"
    task: str = "shapes"
    panel_size: int = 4
    shown: int = 6
    seed: int = 0
    steps: int = 16
    checkpoint: str | None = None
    device: str = "auto"
    none_teaches: bool = False
    annotator: str = "person"

    def __post_init__(self) -> None:
        if self.panel_size < 1 or self.shown < 1:
            raise ConfigError("show at least one sample: panel_size and shown are 1 or more")

    def record(self) -> dict[str, Any]:
        """All settings as plain values, the agent's own defaults included."""
        resolved = dataclasses.asdict(agent_config(self.agent))
        return json.loads(json.dumps({**dataclasses.asdict(self), "agent_config": resolved}))


@dataclass(frozen=True)
class Question:
    """One panel to judge.

    Args:
        number: 1 for the first question.
        x: The proposals ``(K, *event_shape)``, in the order in which they are shown.
        noise: What they were made from, of the same shape; None where the agent does not tell.
        by: Who made them, the reference ``A`` or the model ``B``, which some agents explore with.
        ids: Their names in the feedback store.
    """

    number: int
    x: Tensor
    noise: Tensor | None
    by: Literal["A", "B"]
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of an answer.

    Args:
        taught: Whether the agent learned from it; a skip teaches nothing, nor does "none will do".
        same: Model B's samples ``(K, *event_shape)`` of the question's noises; None where they are not known.
        samples: Fresh samples of model B ``(shown, *event_shape)``.
        metrics: What the agent reports of its round.
    """

    taught: bool
    same: Tensor | None
    samples: Tensor
    metrics: Metrics = field(default_factory=dict)


def claim(folder: Path, record: dict[str, Any]) -> None:
    """Make the folder, or make sure that it holds this episode."""
    writable(folder)
    path = folder / "config.json"
    try:
        if not path.exists():
            write_atomic(folder / "versions.json", json.dumps(versions(), indent=2).encode())
            write_atomic(path, json.dumps(record, indent=2).encode())
        elif json.loads(path.read_text()) != record:
            raise RunError(f"{folder} holds another run; choose another --out, or remove it")
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror or error}") from None
    except json.JSONDecodeError:
        raise RunError(f"{folder} holds a damaged run; remove it and start again") from None
