"""How an agent is moved by answers: played until it asks, taken back, played on, rebuilt."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefenv.agent import Agent, Metrics
from prefenv.checkpoints import write_atomic
from prefenv.errors import CheckpointError, ConfigError, RunError
from prefenv.feedback import Judgement, Panel, sample_id
from prefenv.oracle import Oracle
from prefenv.packing import pack, unpack

KEPT_STATES = 8


class Unanswered(Exception):
    """A round asked about a panel to which there is no answer yet; no error."""

    def __init__(self, panel: Tensor):
        super().__init__("no answer yet")
        self.panel = panel


class Person(Oracle):
    """The person's seat at the desk: gives the answer that lies ready, or interrupts the round.

    Attributes:
        ready: The panel's id and its judgement ``(K,)``, once; None = there is no answer yet.
    """

    nondeterministic = True
    unconditional = True
    ready: tuple[str, Tensor] | None = None

    def judge(self, panels: Tensor) -> Tensor:
        """Judge one panel ``(1, K, *event_shape)``.

        Raises:
            Unanswered: There is no answer yet.
            RunError: The answer that is there was given to other samples.
        """
        if len(panels) != 1:
            raise ConfigError("a person is asked one panel at a time; this agent asks for more")
        if self.ready is None:
            raise Unanswered(panels[0])
        (panel, scores), self.ready = self.ready, None
        if Panel(tuple(sample_id(x) for x in panels[0])).id != panel:
            raise RunError(
                "the kept answers were given to other samples than are made here (another device, or other "
                "versions?): go on where they were given, or choose another --out"
            )
        return scores[None]


class Course:
    """An agent, and the answers that brought it where it is.

    Args:
        agent: Fresh from its seed, in an env of one panel whose oracle is ``person``.
        person: Who is asked.
        folder: Where states are kept.
        record: The settings: they name the states, with the answers.
        none_teaches: Let the agent learn from "none will do".

    Attributes:
        learned: The answers, in order.
    """

    def __init__(
        self, agent: Agent, person: Person, folder: Path, record: dict[str, Any], none_teaches: bool
    ):
        self.agent, self.person, self.folder = agent, person, folder
        self.record, self.none_teaches = record, none_teaches
        self.learned: list[Judgement] = []
        self._save()

    def ask(self) -> tuple[Tensor, Tensor | None]:
        """Play a round until it asks, and go back.

        Returns:
            The panel ``(K, *event_shape)`` and its noises, None where they are not known.
        """
        env, before = self.agent.env, self._path(self.learned)
        try:
            self.agent.learn(env.num_envs)
        except Unanswered as asked:
            return asked.panel, env.noise
        finally:
            self.agent.restore(unpack(before))
        raise ConfigError(f"{self.agent.name} played a round and asked nothing")

    def explores(self, x: Tensor, noise: Tensor | None) -> bool:
        """Whether a panel ``(K, *event_shape)`` is model B's own exploring and not model A's work."""
        env, reference = self.agent.env, self.agent.reference
        if getattr(self.agent.behaviour(), "flow", None) is reference:
            return False
        return noise is None or not torch.allclose(
            env.policy(reference).sample(noise), x, atol=1e-4
        )

    def teaches(self, judgement: Judgement) -> bool:
        """Whether the agent may learn from an answer: not from a skip, nor from "none will do"."""
        told = [s for s in judgement.scores if s is not None]
        return any(told) or (self.none_teaches and bool(told))

    def play(self, judgement: Judgement) -> tuple[bool, Metrics]:
        """Play the round that an answer belongs to. If it is interrupted, the agent is where it was.

        Returns:
            Whether it taught, and what the agent reports.
        """
        before, metrics = self._path(self.learned), {}
        scores = torch.tensor([float("nan") if s is None else s for s in judgement.scores])
        taught = self.teaches(judgement)
        ready = scores if taught else torch.full_like(scores, float("nan"))
        self.person.ready = (judgement.panel, ready)
        try:
            self.agent.learn(
                self.agent.env.num_envs, callback=lambda _, values: metrics.update(values)
            )
        except BaseException:
            self.person.ready = None
            self.agent.restore(unpack(before))
            raise
        if not taught:
            self._unlearn(before)
        self.learned = [*self.learned, judgement]
        self._save()
        return taught, metrics

    def rebuild(self, standing: list[Judgement]) -> None:
        """Bring the agent to where some answers lead: from the last state that is kept, and by replay."""
        for n in range(len(standing), -1, -1):
            self.learned = standing[:n]
            try:
                self.agent.restore(unpack(self._path(self.learned)))
                break
            except CheckpointError:
                continue
        for judgement in standing[len(self.learned) :]:
            self.play(judgement)

    def _unlearn(self, before: Path) -> None:
        """Put the weights and the optimisers back; the rest (random numbers, what was shown) has moved on."""
        old, new = unpack(before), self.agent.state()
        for name in self.agent.persistent:
            if hasattr(getattr(self.agent, name), "load_state_dict"):
                new["parts"][name] = old["parts"][name]
        self.agent.restore(new)

    def _path(self, answers: list[Judgement]) -> Path:
        """Where the state after some answers is kept."""
        text = json.dumps([self.record, [[j.panel, j.samples, j.scores] for j in answers]])
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self.folder / f"{len(answers):04d}-{digest}.safetensors"

    def _save(self) -> None:
        """Keep the agent as it is now, and drop the oldest states but the first."""
        path = self._path(self.learned)
        write_atomic(path, pack(self.agent.state()))
        kept = sorted(self.folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime_ns)
        for old in [p for p in kept if p != path and p.name[:5] != "0000-"][:-KEPT_STATES]:
            old.unlink(missing_ok=True)
