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

A score is a number or None. ``(1, 0, 0, 0)`` = chosen and not; numbers in between = how much each is liked; all 0
= none will do, **which teaches nothing, as in the toy** (``none_teaches`` lets the agent learn from it); all None =
a skip, which teaches nothing either. Both are kept, and are followed by other proposals.

**What is where.** The answers are in ``feedback.sqlite`` (``prefenv.feedback``): an undo is a retraction, and
nothing is deleted. They alone decide the state: the same seed and the same answers give the same proposals and the
same model B, bit by bit. ``states/`` keeps the agent after the last few answers, named by a hash of settings and
answers, so that undo, and starting again after a crash, are quick; whatever is missing there is computed again.

**How the loop is turned round.** The agent owns its loop and asks in the middle of a round. So a round is played
until it asks (``Person`` interrupts it), and the agent goes back to where it was; when there is an answer the round
is played again from the same state, asks the same question, and gets it. An Episode is for one thread at a time,
and a folder for one Episode at a time: put a lock around it where threads serve it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from prefenv import plotting
from prefenv.agent import Agent, Metrics
from prefenv.checkpoints import write_atomic
from prefenv.device import make_generator
from prefenv.envs import FlowVectorEnv
from prefenv.errors import CheckpointError, ConfigError, FeedbackError, RunError
from prefenv.feedback import FeedbackStore, Judgement, Panel, Retraction, model_hash, sample_id
from prefenv.oracle import Oracle
from prefenv.packing import pack, unpack
from prefenv.registry import agent_config, lookup, make_agent, make_task, parse
from prefenv.runs import versions, writable

Scores = Sequence[float | None]
KEPT_STATES = 8
RATED = 512  # samples behind a rate


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
        checkpoint: Reference file; None = the task's own.
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
        self._record = config.record()
        _claim(folder, self._record)
        self.task = make_task(config.task)
        self.person = Person(self.task)
        env = FlowVectorEnv(
            config.panel_size,
            task=self.task,
            oracle=self.person,
            panel_size=config.panel_size,
            steps=config.steps,
            control=lookup("agent", parse(config.agent)[0]).control,
            checkpoint=config.checkpoint,
            reference=reference,
            device=config.device,
        )
        self.agent: Agent = make_agent(config.agent, env, seed=config.seed)
        self.store = FeedbackStore(folder / "feedback.sqlite")
        self._learned: list[Judgement] = []
        self._asked: Question | None = None
        self._save()
        self._rebuild()
        self.resumed = len(self._learned)

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
        if len(self._standing()) > len(self._learned):
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

    def learn(self) -> Outcome:
        """Let the agent learn from the answer that was kept last. If it is interrupted, it can be called again."""
        standing = self._standing()
        if len(standing) != len(self._learned) + 1:
            raise FeedbackError("there is no new answer to learn from: keep one first")
        question = self._asked or self._ask()
        taught, metrics = self._play(standing[-1])
        same = None if question.noise is None else self.agent.sample(question.noise)
        return Outcome(taught, same, self.agent.sample(self._fresh(len(self._learned))), metrics)

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
            self._rebuild()
        return taken

    def make(self, agent: Agent | None, noise: Tensor) -> Tensor:
        """Samples of model B, or (None) of model A, from noises ``(n, *event_shape)``."""
        env = self.agent.env
        return (
            env.policy(self.agent.reference).sample(noise) if agent is None else agent.sample(noise)
        )

    def rates(self, agent: Agent | None = None) -> dict[str, float]:
        """Share of each class in what model B, or (None) model A, makes of the same fixed noises."""
        rng = make_generator(self.config.seed, stream="play rates")
        noise = torch.randn(RATED, *self.task.event_shape, generator=rng)
        kinds = self.task.classify(self.make(agent, noise.to(self.agent.device)))
        share = torch.bincount(kinds.cpu(), minlength=len(self.task.classes)) / RATED
        return dict(zip(self.task.classes, share.tolist(), strict=True))

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
            "learned": len(self._learned),
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

    # How the agent is moved.

    def _fresh(self, number: int, n: int | None = None) -> Tensor:
        """Noises of the samples shown after so many answers, ``(shown, *event_shape)``."""
        rng = make_generator(self.config.seed, stream=f"play {number}")
        noise = torch.randn(n or self.config.shown, *self.task.event_shape, generator=rng)
        return noise.to(self.agent.device)

    def _standing(self) -> list[Judgement]:
        return self.store.judgements(self.config.annotator)

    def _alone(self) -> None:
        """Refuse to write after somebody else wrote."""
        if [j.id for j in self._standing()] != [j.id for j in self._learned]:
            raise RunError(f"another process answers in {self.folder}: close one of them")

    def _ask(self) -> Question:
        """Play a round until it asks, and go back."""
        env, before = self.agent.env, self._path()
        try:
            self.agent.learn(self.config.panel_size)
        except Unanswered as asked:
            x, noise = asked.panel, env.noise
        else:
            raise ConfigError(f"{self.config.agent} played a round and asked nothing")
        finally:
            self.agent.restore(unpack(before))
        explores = getattr(self.agent.behaviour(), "flow", None) is not self.agent.reference
        if noise is not None:
            by_a = torch.allclose(self.make(None, noise), x, atol=1e-4)
            explores = explores and not by_a
        maker = self.agent.model if explores else self.agent.reference
        info = {"steps": self.config.steps, "agent": self.config.agent}
        origin = {"task": self.task.name, "model": model_hash(maker), "seed": self.config.seed}
        given = None if noise is None else noise[None]
        (panel,) = self.store.ask(x[None], given, **origin, info=info)
        number = len(self._learned) + 1
        return Question(number, x, noise, "B" if explores else "A", panel.samples)

    def _play(self, judgement: Judgement) -> tuple[bool, Metrics]:
        """Play the round that an answer belongs to; says whether it taught, and what the agent reports."""
        before, metrics = self._path(), {}
        scores = torch.tensor([float("nan") if s is None else s for s in judgement.scores])
        taught = bool((scores > 0).any()) or (
            self.config.none_teaches and bool((scores == 0).any())
        )
        ready = scores if taught else torch.full_like(scores, float("nan"))
        self.person.ready = (judgement.panel, ready)
        try:
            self.agent.learn(
                self.config.panel_size, callback=lambda _, values: metrics.update(values)
            )
        except BaseException:
            self.person.ready = None
            self.agent.restore(unpack(before))
            raise
        if not taught:
            self._unlearn(before)
        self._learned, self._asked = [*self._learned, judgement], None
        self._save()
        return taught, metrics

    def _unlearn(self, before: Path) -> None:
        """Put the weights and the optimisers back; the rest (random numbers, what was shown) has moved on."""
        old, new = unpack(before), self.agent.state()
        for name in self.agent.persistent:
            if hasattr(getattr(self.agent, name), "load_state_dict"):
                new["parts"][name] = old["parts"][name]
        self.agent.restore(new)

    def _path(self, answers: list[Judgement] | None = None) -> Path:
        """Where the state after some answers is kept; None = after those that are learned."""
        answers = self._learned if answers is None else answers
        text = json.dumps([self._record, [[j.panel, j.samples, j.scores] for j in answers]])
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self.folder / "states" / f"{len(answers):04d}-{digest}.safetensors"

    def _save(self) -> None:
        """Keep the agent as it is now, and drop the oldest states but the first."""
        path = self._path()
        write_atomic(path, pack(self.agent.state()))
        kept = sorted(path.parent.glob("*.safetensors"), key=lambda p: p.stat().st_mtime_ns)
        for old in [p for p in kept if p != path and not p.name.startswith("0000-")][:-KEPT_STATES]:
            old.unlink(missing_ok=True)

    def _rebuild(self) -> None:
        """Bring the agent to where the answers that stand lead: from the last state that is kept, and by replay."""
        standing = self._standing()
        for n in range(len(standing), -1, -1):
            try:
                self.agent.restore(unpack(self._path(standing[:n])))
            except CheckpointError:
                continue
            break
        self._learned, self._asked = standing[:n], None
        for judgement in standing[n:]:
            self._play(judgement)


def _claim(folder: Path, record: dict[str, Any]) -> None:
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
