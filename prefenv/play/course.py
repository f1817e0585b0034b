"""How an agent is moved by people's answers: played until it asks, taught, taken back, rebuilt.

The answers alone decide the state: the same settings, seed and answers give the same questions and the same
model B. What an agent asks while it has not yet learned from what it asked before: ``prefenv.play.ahead``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from prefenv.agent import Agent, Callback, Metrics
from prefenv.checkpoints import write_atomic
from prefenv.device import make_generator
from prefenv.errors import CheckpointError, ConfigError, RunError
from prefenv.feedback import FeedbackStore, Judgement, Panel, model_hash, sample_id
from prefenv.oracle import Oracle
from prefenv.packing import pack, unpack

KEPT_STATES = 8
RATED = 512  # samples behind a rate
Round = tuple[Judgement, ...]  # the answers to the panels of one round, in the agent's order


class Unanswered(Exception):
    """A round asked about panels to which there is no answer yet; no error."""

    def __init__(self, panels: Tensor):
        super().__init__("no answer yet")
        self.panels = panels


class Person(Oracle):
    """The people's seat at the desk: gives the answers that lie ready, or interrupts the round.

    Attributes:
        ready: Panels' ids and judgements ``(m, K)``, once; None = there is no answer yet.
        away: Answer nothing (NaN), and interrupt nothing.
    """

    nondeterministic = True
    unconditional = True
    ready: tuple[list[str], Tensor] | None = None
    away: bool = False

    def judge(self, panels: Tensor) -> Tensor:
        """Judge panels ``(m, K, *event_shape)``.

        Raises:
            Unanswered: There is no answer yet.
            RunError: The answers that are there were given to other samples.
        """
        if self.away:
            return torch.full(panels.shape[:2], torch.nan)
        if self.ready is None:
            raise Unanswered(panels)
        (asked, scores), self.ready = self.ready, None
        same(panels, asked)
        return scores


def same(panels: Tensor, asked: list[str]) -> None:
    """Make sure that these are the panels of these ids.

    Raises:
        RunError: They are not.
    """
    if [Panel(tuple(sample_id(x) for x in panel)).id for panel in panels] != asked:
        raise RunError(
            "the kept answers were given to other samples than are made here (another device, or other "
            "versions?): go on where they were given, or choose another --out"
        )


@dataclass(frozen=True)
class Asked:
    """The questions of one round.

    Args:
        number: 0 for the first round.
        x: Panels ``(m, K, *event_shape)``.
        noise: What they were made from, of the same shape; None where that is not known.
        by: Who made them: the reference ``A``, or the model ``B``, which some agents explore with.
        model: ``model_hash`` of who made them.
        learned: Rounds that the agent had learned from when it asked.
    """

    number: int
    x: Tensor
    noise: Tensor | None
    by: Literal["A", "B"]
    model: str
    learned: int


class Course:
    """An agent, and the answers that brought it where it is.

    Args:
        agent: Fresh from its seed, in an env whose oracle is ``person``.
        person: Who is asked.
        folder: Where states are kept.
        record: The settings: they name the states, with the answers.
        none_teaches: Let the agent learn from "none will do".

    Attributes:
        learned: The rounds of answers, in order.
    """

    def __init__(
        self,
        agent: Agent,
        person: Person,
        folder: Path,
        record: dict[str, Any],
        none_teaches: bool = False,
    ):
        self.agent, self.person, self.folder = agent, person, folder
        self.record, self.none_teaches = record, none_teaches
        self.learned: list[Round] = []
        self._advance()
        self._save()

    def ask(self) -> list[Asked]:
        """The rounds that wait for answers: the next one, and perhaps some after it."""
        env, before = self.agent.env, self._path(self.learned)
        try:
            self.agent.learn(env.num_envs)
        except Unanswered as asked:
            if len(asked.panels) * env.panel_size == env.num_envs:
                return [self._asked(asked.panels, env.noise)]
        finally:
            self._restore(unpack(before))
        panels = env.num_envs // env.panel_size
        raise ConfigError(f"{self.agent.name} does not ask {panels} panels at once in each round")

    def put(self, store: FeedbackStore, asked: Asked) -> list[Panel]:
        """Keep the questions of a round in a store, with who made them and when."""
        info = {name: self.record[name] for name in ("steps", "agent")}
        info |= {"round": asked.number, "learned": asked.learned}
        return store.ask(
            asked.x,
            asked.noise,
            task=self.agent.env.task.name,
            model=asked.model,
            seed=self.agent.seed,
            info=info,
        )

    def teaches(self, judgement: Judgement) -> bool:
        """Whether the agent may learn from an answer: not from a skip, nor from "none will do"."""
        told = [s for s in judgement.scores if s is not None]
        return any(told) or (self.none_teaches and bool(told))

    def play(self, answers: Round) -> tuple[bool, Metrics]:
        """Play the round that answers belong to. If it is interrupted, the agent is where it was.

        Returns:
            Whether it taught, and what the agent reports.
        """
        known, metrics = self.learned, {}
        taught = [self.teaches(j) for j in answers]
        told = [[float("nan") if s is None else s for s in j.scores] for j in answers]
        scores = torch.tensor(told).masked_fill(~torch.tensor(taught)[:, None], torch.nan)
        try:
            self._learn([j.panel for j in answers], scores, lambda _, new: metrics.update(new))
            if not any(taught):
                self._unlearn(self._path(known))
            self.learned = [*known, answers]
            self._advance()
        except BaseException:
            self.learned = known
            self._restore(unpack(self._path(known)))
            raise
        self._save()
        return any(taught), metrics

    def rebuild(self, standing: list[Round]) -> None:
        """Bring the agent to where some answers lead: from the last state that is kept, and by replay."""
        for n in range(len(standing), -1, -1):
            self.learned = standing[:n]
            try:
                self._restore(unpack(self._path(self.learned)))
                break
            except CheckpointError:
                continue
        for answers in standing[len(self.learned) :]:
            self.play(answers)

    def rates(self, model: Any = None) -> dict[str, float]:
        """Share of each class in what a model (None = model A) makes of the same fixed noises."""
        env = self.agent.env
        if not env.task.classes:
            return {}
        rng = make_generator(self.agent.seed, stream="play rates")
        noise = torch.randn(RATED, *env.task.event_shape, generator=rng).to(self.agent.device)
        kinds = env.task.classify((model or env.policy(self.agent.reference)).sample(noise))
        share = torch.bincount(kinds.cpu(), minlength=len(env.task.classes)) / RATED
        return dict(zip(env.task.classes, share.tolist(), strict=True))

    # How a round is played, which ``Ahead`` does in its own way.

    def _learn(self, panels: list[str], scores: Tensor, callback: Callback) -> None:
        self.person.ready = panels, scores
        try:
            self.agent.learn(self.agent.env.num_envs, callback=callback)
        finally:
            self.person.ready = None

    def _advance(self) -> None:
        """Called where the agent has come to a new state."""

    def _state(self) -> dict[str, Any]:
        return self.agent.state()

    def _restore(self, state: dict[str, Any]) -> None:
        self.agent.restore(state)

    def _asked(self, x: Tensor, noise: Tensor | None, number: int | None = None) -> Asked:
        """Panels ``(m, K, *event_shape)`` that the agent asks about now, and what it knows of them."""
        agent, n = self.agent, len(self.learned)
        noise = None if noise is None else noise.view_as(x)
        explores = self._explores(x.flatten(0, 1), None if noise is None else noise.flatten(0, 1))
        model = model_hash(agent.model if explores else agent.reference)
        return Asked(n if number is None else number, x, noise, "B" if explores else "A", model, n)

    def _explores(self, x: Tensor, noise: Tensor | None) -> bool:
        """Whether samples ``(n, *event_shape)`` are model B's own exploring and not model A's work."""
        env, reference = self.agent.env, self.agent.reference
        if getattr(self.agent.behaviour(), "flow", None) is reference:
            return False
        return noise is None or not torch.allclose(
            env.policy(reference).sample(noise), x, atol=1e-4
        )

    def _unlearn(self, before: Path) -> None:
        """Put the weights and the optimisers back; the rest (random numbers, what was shown) has moved on."""
        old, new = unpack(before), self.agent.state()
        for name in self.agent.persistent:
            if hasattr(getattr(self.agent, name), "load_state_dict"):
                new["parts"][name] = old["parts"][name]
        self.agent.restore(new)

    def _path(self, rounds: list[Round]) -> Path:
        """Where the state after some rounds is kept."""
        answers = [[[j.panel, j.samples, j.scores] for j in answers] for answers in rounds]
        digest = hashlib.sha256(json.dumps([self.record, answers]).encode()).hexdigest()[:16]
        return self.folder / f"{len(rounds):04d}-{digest}.safetensors"

    def _save(self) -> None:
        """Keep the agent as it is now, and drop the oldest states but the first."""
        path = self._path(self.learned)
        write_atomic(path, pack(self._state()))
        kept = sorted(self.folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime_ns)
        for old in [p for p in kept if p != path and p.name[:5] != "0000-"][:-KEPT_STATES]:
            old.unlink(missing_ok=True)
