"""``prefenv play --oracle web``: an episode on the page. The agent learns round by round while people answer.

A round is ``panels`` questions, which so many annotators may answer at once. The answers alone decide the state:
the same seed and the same answers give the same proposals and the same model B. ``web/`` keeps the agent after
the last rounds, named by a hash of the answers behind them, so starting again is quick. Where an answer that was
learned from is taken back, the agent returns to the last state that all standing answers lead to, and goes on.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from oracles.web.agreement import agreement
from oracles.web.oracle import Closed, Stale, WebOracle
from prefenv.agent import Agent
from prefenv.checkpoints import write_atomic
from prefenv.envs import FlowVectorEnv
from prefenv.errors import CheckpointError
from prefenv.feedback import FeedbackStore, Judgement, Panel, sample_id
from prefenv.oracle import Oracle
from prefenv.packing import pack, unpack
from prefenv.registry import lookup, make_agent, make_task, parse

KEPT_STATES = 8
RATED = 512  # samples behind a rate
LINGER = 5.0  # seconds that the page is still served when all rounds are played
Round = list[tuple[list[str], list[float | None]]]  # panels: ids of samples, and scores


class Course(Oracle):
    """An agent that learns from a page, and the answers that brought it where it is.

    Args:
        web: The page.
        config: The episode's settings (``prefenv.play.PlayConfig``).
        folder: The episode's folder.
        panels: Questions of a round.
        reference: Model A, instead of a checkpoint.
    """

    nondeterministic = True
    unconditional = True

    def __init__(
        self, web: WebOracle, config: Any, folder: Path, panels: int = 1, reference: Any = None
    ):
        super().__init__(web.task)
        self.web, self.config, self.folder = web, config, folder / "web"
        env = FlowVectorEnv(
            config.panel_size * panels,
            task=web.task,
            oracle=self,
            panel_size=config.panel_size,
            steps=config.steps,
            control=lookup("agent", parse(config.agent)[0]).control,
            checkpoint=config.checkpoint,
            reference=reference,
            device=config.device,
        )
        self.agent: Agent = make_agent(config.agent, env, seed=config.seed)
        self.store = FeedbackStore(web.path)
        self.rounds: list[Round] = []
        self._asked: Round = []
        self._save()
        self.rebuild()

    def judge(self, panels: Tensor) -> Tensor:
        """Ask the page. "None will do" teaches nothing, as in the toy, unless ``none_teaches``."""
        scores = self.web.judge(panels)
        ids = [[sample_id(x) for x in panel] for panel in panels]
        told = [[None if s != s else s for s in row] for row in scores.tolist()]
        self._asked.extend(zip(ids, told, strict=True))
        if not self.config.none_teaches:
            scores = scores.masked_fill((scores == 0).all(1, keepdim=True), torch.nan)
        return scores

    def round(self) -> None:
        """Learn from one more round.

        Raises:
            Stale: An answer that was learned from was taken back: ``rebuild``.
            Closed: The page was closed.
        """
        self._asked = []
        self.agent.learn(self.agent.env.num_envs)
        self.rounds = [*self.rounds, self._asked]
        self._save()

    def rebuild(self) -> None:
        """Go back to the last kept state that all standing answers lead to."""
        try:
            rounds = json.loads((self.folder / "rounds.json").read_text())
        except (OSError, ValueError):
            rounds = self.rounds
        stands = next((i for i, r in enumerate(rounds) if not self._stands(r)), len(rounds))
        for n in range(stands, -1, -1):
            try:
                self.agent.restore(unpack(self._path(rounds[:n])))
            except CheckpointError:
                continue
            self.rounds = rounds[:n]
            return

    def _stands(self, answers: Round) -> bool:
        """Whether the answers of a round are what the file holds now."""
        known = [self.store.scores(Panel(tuple(ids))) for ids, _ in answers]
        return known == [dict(zip(ids, scores, strict=True)) for ids, scores in answers]

    def _path(self, rounds: list[Round]) -> Path:
        settings = {k: v for k, v in vars(self.config).items() if isinstance(v, str | int | None)}
        text = json.dumps([settings, self.agent.env.num_envs, rounds], default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self.folder / f"{len(rounds):04d}-{digest}.safetensors"

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(self.rounds)
        write_atomic(path, pack(self.agent.state()))
        if self.rounds:
            write_atomic(self.folder / "rounds.json", json.dumps(self.rounds).encode())
        kept = sorted(self.folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime_ns)
        for old in [p for p in kept if p != path and p.name[:4] != "0000"][:-KEPT_STATES]:
            old.unlink(missing_ok=True)

    def close(self) -> None:
        """Close its files."""
        self.store.close()
        self.agent.env.close()

    def rates(self, model: Any) -> dict[str, float]:
        """Share of each class in what a model makes of the same fixed noises."""
        shape = (RATED, *self.task.event_shape)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(self.config.seed))
        kinds = self.task.classify(model.sample(noise.to(self.agent.device)))
        share = torch.bincount(kinds.cpu(), minlength=len(self.task.classes)) / RATED
        return dict(zip(self.task.classes, share.tolist(), strict=True))

    def summary(self) -> dict[str, Any]:
        """What was answered, and what came of it."""
        standing, history = self.store.judgements(), self.store.history()
        return {
            "agent": self.config.agent,
            "task": self.config.task,
            "seed": self.config.seed,
            "answers": len(standing),
            "annotators": sorted({j.annotator for j in standing}),
            "undone": sum(not isinstance(e, Judgement) for e in history),
            "rounds": len(self.rounds),
            "seconds_answering": sum(j.seconds or 0.0 for j in standing),
            "agreement": asdict(agreement(standing)),
            "rates_before": self.rates(self.agent.env.reference),
            "rates_after": self.rates(self.agent),
            "folder": str(self.folder.parent),
        }


def closing(summary: dict[str, Any]) -> str:
    """A summary in words."""
    before, after = summary["rates_before"], summary["rates_after"]
    rates = ", ".join(f"{100 * before[k]:.0f} -> {100 * after[k]:.0f} % {k}" for k in before)
    alpha = summary["agreement"]["alpha"]
    agree = "" if alpha is None else f"; they agree with Krippendorff's alpha {alpha:.2f}"
    return (
        f"{summary['answers']} answers by {len(summary['annotators'])} annotators{agree}; model A -> B: {rates}\n"
        f"All answers are kept in {summary['folder']}; the same command goes on."
    )


def play(
    config: Any,
    folder: Path,
    out: TextIO | None = None,
    *,
    panels: int = 1,
    rounds: int | None = None,
    reference: Any = None,
    **settings: Any,
) -> dict[str, Any]:
    """Play an episode on the page until Ctrl-C; returns the summary, and writes ``summary.json``.

    Args:
        config: The episode's settings (``prefenv.play.PlayConfig``).
        folder: Its folder; an episode that is in it goes on.
        out: Where the link goes; None = standard output.
        panels: Questions of a round: about as many as there are annotators.
        rounds: Stop after so many.
        reference: Model A, instead of a checkpoint.
        settings: Of ``WebOracle``: ``port``, ``overlap``, ``repeats``, ...
    """
    out = out or sys.stdout
    web = WebOracle(
        make_task(config.task), str(folder / "feedback.sqlite"), restart=True, **settings
    )
    try:
        print(f"Answer at {web.start()}\nCtrl-C ends; all answers are kept.", file=out, flush=True)
        course = Course(web, config, folder, panels, reference)
        try:
            while rounds is None or len(course.rounds) < rounds or web.session.questions.stale:
                try:
                    web.session.board.publish(course.agent, last=True)
                    course.round()
                except Stale:
                    course.rebuild()
            web.session.finish(course.agent)
            time.sleep(LINGER)  # so that pages see the end
        except (KeyboardInterrupt, Closed):
            course.rebuild()  # a round that was interrupted is played again
        summary = course.summary()
        course.close()
        write_atomic(folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        print(closing(summary), file=out, flush=True)
        return summary
    finally:
        web.close()
