"""``prefenv play --oracle web``: an episode on the page. The agent learns in the background while people answer.

A round is ``panels`` questions, which so many annotators may answer at once. While the agent learns from a round,
the next ``ahead`` rounds are open, where the agent can be asked so (``prefenv.play.ahead``); where it cannot, the
page says that it learns. The server has threads of its own: answers are kept, and may be taken back, at any time.

The answers that stand alone decide the state, in whatever order and however fast they came. ``web/`` keeps the
agent after the last rounds, named by a hash of the answers behind them, so starting again is quick. Where an
answer that was learned from, or is just being learned from, is taken back, the agent returns to the last state
that all standing answers lead to, and goes on from there.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from oracles.web.agreement import agreement
from oracles.web.oracle import WebOracle
from prefenv.checkpoints import write_atomic
from prefenv.feedback import Judgement, Panel
from prefenv.play.ahead import make_course
from prefenv.play.course import Round
from prefenv.play.records import PlayConfig
from prefenv.registry import make_task

LINGER = 5.0  # seconds that the page is still served when all rounds are played


class Party:
    """A course on a page: the rounds that are open, learned from and taken back.

    Args:
        web: The page.
        config: The episode's settings.
        folder: The episode's folder.
        rounds: Ask no more than so many.
        course: Of ``make_course``: ``panels``, ``ahead``, ``reference``.
    """

    def __init__(
        self,
        web: WebOracle,
        config: PlayConfig,
        folder: Path,
        rounds: int | None = None,
        **course: Any,
    ):
        self.config, self.folder, self.rounds = config, folder, rounds
        self.session, self.kept = web.session, folder / "web" / "rounds.json"
        self.course = make_course(config, folder / "web", **course)
        self._rebuild()

    @property
    def over(self) -> bool:
        """Whether all rounds are learned from, and all their answers stand."""
        stale = self.session.questions.stale
        return self.rounds is not None and len(self.course.learned) >= self.rounds and not stale

    def round(self) -> None:
        """Ask, and learn from one more round; or unlearn, where an answer was taken back.

        Raises:
            Closed: The page was closed.
        """
        course, session, questions = self.course, self.session, self.session.questions
        if questions.stale:
            questions.withdraw()
            self._rebuild()
            return
        waiting = [course.put(session.store, asked) for asked in course.ask()]
        if self.rounds is not None:
            waiting = waiting[: self.rounds - len(course.learned)]
        questions.put([panel for panels in waiting for panel in panels])
        session.board.publish(course.agent, last=True)
        if not session.wait(waiting[0], lambda: questions.stale):
            return
        answers = [a for a in map(self._answer, waiting[0]) if a is not None]
        if len(answers) == len(waiting[0]):  # else one was taken back in this moment
            course.play(tuple(answers))
            self._keep(course.learned)

    def _answer(self, panel: Panel) -> Judgement | None:
        """What the annotators say together; None where all took it back."""
        scores = self.session.store.scores(panel)
        return scores and Judgement(panel.samples, tuple(scores[s] for s in panel.samples))

    def _rebuild(self) -> None:
        """Go back to where the answers lead that still stand."""
        try:
            rounds = [
                tuple(Judgement(*answer) for answer in answers)
                for answers in json.loads(self.kept.read_text())
            ]
        except (OSError, ValueError, TypeError):
            rounds = self.course.learned
        self.session.questions.tell(j.panel for answers in rounds for j in answers)
        stands = next((i for i, r in enumerate(rounds) if not self._stands(r)), len(rounds))
        self.course.rebuild(rounds[:stands])

    def _stands(self, answers: Round) -> bool:
        """Whether the answers of a round are what the file holds now."""
        for known in answers:
            now = self._answer(Panel(known.samples))
            if now is None or now.scores != known.scores:
                return False
        return True

    def _keep(self, rounds: list[Round]) -> None:
        plain = [[[j.samples, j.scores] for j in answers] for answers in rounds]
        write_atomic(self.kept, json.dumps(plain).encode())

    def summary(self) -> dict[str, Any]:
        """What was answered, and what came of it."""
        course, store = self.course, self.session.store
        standing, history = store.judgements(), store.history()
        return {
            "agent": self.config.agent,
            "task": self.config.task,
            "seed": self.config.seed,
            "answers": len(standing),
            "annotators": sorted({j.annotator for j in standing}),
            "undone": sum(not isinstance(e, Judgement) for e in history),
            "rounds": len(course.learned),
            "seconds_answering": sum(j.seconds or 0.0 for j in standing),
            "seconds_learning": course.agent.env.ledger.seconds,
            "agreement": asdict(agreement(standing)),
            "rates_before": course.rates(),
            "rates_after": course.rates(course.agent),
            "folder": str(self.folder),
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
    config: PlayConfig,
    folder: Path,
    out: TextIO | None = None,
    *,
    panels: int = 1,
    ahead: int | None = None,
    rounds: int | None = None,
    reference: Any = None,
    **settings: Any,
) -> dict[str, Any]:
    """Play an episode on the page until Ctrl-C; returns the summary, and writes ``summary.json``.

    Args:
        config: The episode's settings.
        folder: Its folder; an episode that is in it goes on.
        out: Where the link goes; None = standard output.
        panels: Questions of a round: about as many as there are annotators.
        ahead: Rounds that are open while the agent learns from the one before; None = 1, or 0 where the agent
            must learn before it asks on.
        rounds: Stop after so many.
        reference: Model A, instead of a checkpoint.
        settings: Of ``WebOracle``: ``port``, ``overlap``, ``repeats``, ...
    """
    out = out or sys.stdout
    web = WebOracle(make_task(config.task), str(folder / "feedback.sqlite"), **settings)
    try:
        print(f"Answer at {web.start()}\nCtrl-C ends; all answers are kept.", file=out, flush=True)
        party = Party(web, config, folder, rounds, panels=panels, ahead=ahead, reference=reference)
        try:
            while not party.over:
                while not party.over:
                    party.round()
                web.session.finish(party.course.agent)
                time.sleep(
                    LINGER
                )  # so that pages see the end, and the last answer can be taken back
        except KeyboardInterrupt:
            pass  # a round that was interrupted is played again when it goes on
        summary = party.summary()
        party.course.agent.env.close()
        write_atomic(folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        print(closing(summary), file=out, flush=True)
        return summary
    finally:
        web.close()
