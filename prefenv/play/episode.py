"""An interactive episode: a person answers one panel at a time, and an agent moves model A toward what they like.

The order is that of HIL-DD's toy (its README): samples of model A; a panel of proposals; the answer; what model B
makes of the panel's own noises, then samples of model B; again. A face (terminal, window, web page) drives it::

    with Episode(PlayConfig(), Path("runs/play")) as episode:      # goes on where the folder was left
        show(episode.opening())                                    # (shown, *event_shape), model A
        while wanted:
            question = episode.question                            # .x (K, *event_shape), .noise, .by, .number
            episode.keep((1, 0, 0, 0), seconds=2.5)                # on the disk when it returns: acknowledge now
            outcome = episode.learn()                              # seconds; .taught, .same, .samples (model B)
            episode.undo()                                         # takes the last answer back, as often as wanted
        summary = episode.finish()                                 # rates before and after; writes summary.json

A score is a number or None. ``(1, 0, 0, 0)`` = chosen and not; numbers in between = how much each is liked;
all 0 = none will do, **which teaches nothing, as in the toy** (``none_teaches`` lets the agent learn from it);
all None = a skip, which teaches nothing either. Both are kept, and are followed by other proposals.

**What is where.** The answers are in ``feedback.sqlite`` (``prefenv.feedback``): an undo is a retraction, and
nothing is deleted. They alone decide the state: the same seed and the same answers give the same proposals and the
same model B, bit by bit. ``states/`` keeps the agent after the last few answers, named by a hash of settings and
answers, so that undo, and starting again after a crash, are quick; whatever is missing there is computed again.

**How the loop is turned round** (``course``). The agent owns its loop and asks in the middle of a round. So a
round is played until it asks (``Person`` interrupts it), and the agent goes back to where it was; when there is an
answer the round is played again from the same state, asks the same question, and gets it. An Episode is for one
thread at a time, and a folder for one Episode at a time: put a lock around it where threads serve it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefenv import plotting
from prefenv.agent import Agent
from prefenv.checkpoints import write_atomic
from prefenv.device import make_generator
from prefenv.errors import FeedbackError, RunError
from prefenv.feedback import FeedbackStore, Judgement, Retraction
from prefenv.play.ahead import make_course
from prefenv.play.records import Outcome, PlayConfig, Question, claim

Scores = Sequence[float | None]


class Episode:
    """An agent, a folder and a person.

    Args:
        config: The settings.
        folder: Made if it is missing; an episode that is in it goes on.
        reference: Model A, instead of a checkpoint.

    Attributes:
        resumed: Answers that stood in the folder when it was opened.

    Raises:
        RunError: The folder cannot be written, or holds another episode.
        ConfigError: Settings that do not fit together.
    """

    def __init__(self, config: PlayConfig, folder: Path, reference: Any = None):
        self.config, self.folder = config, folder
        claim(folder, config.record())
        self.course = make_course(config, folder / "states", reference=reference)
        self.agent: Agent = self.course.agent
        self.task = self.agent.env.task
        self.store = FeedbackStore(folder / "feedback.sqlite")
        self.course.rebuild([(j,) for j in self._standing()])
        self._asked: Question | None = None
        self.resumed = len(self.course.learned)

    def __enter__(self) -> Episode:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; everything answered stays, and the folder can be opened again."""
        self.store.close()
        self.agent.env.close()

    # What a face calls.

    def opening(self) -> Tensor:
        """Samples of model A, ``(shown, *event_shape)``."""
        return self.make(None, self._fresh(0))

    @property
    def question(self) -> Question:
        """The panel that waits for an answer; learns first from one that is kept and not yet learned."""
        if len(self._standing()) > len(self.course.learned):
            self.learn()
        if self._asked is None:
            self._asked = self._ask()
        return self._asked

    def keep(self, scores: Scores, seconds: float | None = None) -> Judgement:
        """Keep the answer to ``question``. When this returns it is on the disk: acknowledge it now, not before.

        Args:
            scores: One for each proposal, in the order shown; None = no answer.
            seconds: Time to answer.

        Raises:
            RunError: Another process answers in this folder.
            FeedbackError: Not one score for each proposal, or the file cannot be written.
        """
        question = self.question
        judgement = Judgement(question.ids, tuple(scores), self.config.annotator, seconds)
        self._alone()
        self.store.answer(judgement)
        return judgement

    def teaches(self, judgement: Judgement) -> bool:
        """Whether the agent may learn from an answer: not from a skip, nor from "none will do"."""
        return self.course.teaches(judgement)

    def learn(self) -> Outcome:
        """Let the agent learn from the answer that was kept last. If it is interrupted, it can be called again."""
        standing = self._standing()
        if len(standing) != len(self.course.learned) + 1:
            raise FeedbackError("there is no new answer to learn from: keep one first")
        question = self._asked or self._ask()
        taught, metrics = self.course.play((standing[-1],))
        self._asked = None
        same = None if question.noise is None else self.agent.sample(question.noise)
        return Outcome(
            taught, same, self.agent.sample(self._fresh(len(self.course.learned))), metrics
        )

    def answer(self, scores: Scores, seconds: float | None = None) -> Outcome:
        """``keep`` and ``learn`` in one."""
        self.keep(scores, seconds)
        return self.learn()

    def undo(self) -> Judgement | None:
        """Take the last answer that stands back, and ask its question again.

        Returns:
            The answer that was taken back; None where none is left.
        """
        taken = self.store.undo(self.config.annotator)
        if taken is not None:
            self.course.rebuild([(j,) for j in self._standing()])
            self._asked = None
        return taken

    def make(self, agent: Agent | None, noise: Tensor) -> Tensor:
        """Samples of model B, or (None) of model A, from noises ``(n, *event_shape)``."""
        env = self.agent.env
        return (
            env.policy(self.agent.reference).sample(noise) if agent is None else agent.sample(noise)
        )

    def rates(self, agent: Agent | None = None) -> dict[str, float]:
        """Share of each class in what model B, or (None) model A, makes of the same fixed noises."""
        return self.course.rates(agent)

    @cached_property
    def before(self) -> dict[str, float]:
        """``rates`` of model A."""
        return self.rates()

    def finish(self) -> dict[str, Any]:
        """Write ``summary.json`` and ``shapes.png`` (A beside B); the episode can still go on.

        Returns:
            The summary.
        """
        standing, history = self._standing(), self.store.history()
        told = [[s for s in j.scores if s is not None] for j in standing]
        skips, nones = sum(not t for t in told), sum(bool(t) and not any(t) for t in told)
        summary = {
            "agent": self.config.agent,
            "task": self.config.task,
            "seed": self.config.seed,
            "answers": len(standing),
            "choices": len(standing) - skips - nones,
            "none_will_do": nones,
            "skips": skips,
            "undone": sum(isinstance(e, Retraction) for e in history),
            "learned": len(self.course.learned),
            "seconds_answering": sum(j.seconds or 0.0 for j in standing),
            "seconds_learning": self.agent.env.ledger.seconds,
            "rates_before": self.before,
            "rates_after": self.rates(self.agent),
            "folder": str(self.folder),
        }
        noise = self._fresh(0, 12)
        a, b = (self.make(m, noise).cpu().numpy() for m in (None, self.agent))
        plotting.beside(self.task, a, b).savefig(self.folder / "shapes.png")
        write_atomic(self.folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        return summary

    def _fresh(self, number: int, n: int | None = None) -> Tensor:
        """Noises of the samples shown after so many answers, ``(shown, *event_shape)``."""
        rng = make_generator(self.config.seed, stream=f"play {number}")
        noise = torch.randn(n or self.config.shown, *self.task.event_shape, generator=rng)
        return noise.to(self.agent.device)

    def _standing(self) -> list[Judgement]:
        return self.store.judgements(self.config.annotator)

    def _alone(self) -> None:
        """Refuse to write after somebody else wrote."""
        if [j.id for j in self._standing()] != [j.id for (j,) in self.course.learned]:
            raise RunError(f"another process answers in {self.folder}: close one of them")

    def _ask(self) -> Question:
        (asked,) = self.course.ask()
        (panel,) = self.course.put(self.store, asked)
        noise = None if asked.noise is None else asked.noise[0]
        return Question(asked.number + 1, asked.x[0], noise, asked.by, panel.samples)
