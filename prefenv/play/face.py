"""What all faces of an episode share: a person who is shown samples and asked, in a terminal or in a window.

A face writes ``show``, ``say`` and ``listen``; ``Face`` makes of them the toy's episode (``play``), and an oracle
that any run can ask (``judge``).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from torch import Tensor

from prefenv.feedback import FeedbackStore, Judgement
from prefenv.oracle import Oracle
from prefenv.play.episode import Episode
from prefenv.play.records import Outcome, Question
from prefenv.play.report import closing, percent
from prefenv.play.words import Reply, allowed, write
from prefenv.tasks import Task


class Leave(Exception):
    """The person wants to go: by q, Ctrl-C, the end of the input, or by closing the window."""


@dataclass(frozen=True)
class Row:
    """Samples shown together.

    Args:
        title: What they are.
        samples: ``(n, *event_shape)``.
        by: The model that made them: ``A`` is red, ``B`` green.
        numbered: Whether they carry their indices.
    """

    title: str
    samples: Tensor
    by: str
    numbered: bool = False


class Face(Oracle):
    """A person.

    Args:
        task: The task whose samples are judged.
        path: Feedback file of the answers, where it is the oracle of a run.
        annotator: Who answers.
        out: Where words go; None = standard output.
    """

    nondeterministic = True
    unconditional = True

    def __init__(
        self,
        task: Task,
        path: str = "feedback.sqlite",
        annotator: str = "person",
        *,
        out: TextIO | None = None,
    ):
        super().__init__(task)
        self.path, self.annotator, self.out = path, annotator, out or sys.stdout

    # What a face writes.

    def say(self, text: str) -> None:
        """Tell the person something."""
        raise NotImplementedError

    def hint(self, size: int) -> str:
        """How to answer about a panel of ``size`` samples, in one line."""
        return f"You are asked next: {allowed(size)}."

    def busy(self, text: str) -> None:
        """Tell the person what is being done now."""
        self.say(text)

    def show(self, rows: Sequence[Row], note: str = "") -> None:
        """Show samples, and a line below; returns when the person has seen them."""
        raise NotImplementedError

    def listen(self, row: Row) -> tuple[Reply, float]:
        """Show a panel and ask until there is an answer.

        Returns:
            The reply (scores, undo or skip) and the seconds it took.

        Raises:
            Leave: The person wants to go.
        """
        raise NotImplementedError

    # The oracle of a run.

    def judge(self, panels: Tensor) -> Tensor:
        """Ask about panels ``(m, K, *event_shape)``; skipped ones are NaN, what is in the file is not asked again.

        Raises:
            KeyboardInterrupt: The person left; what was answered is kept.
        """
        with FeedbackStore(self.path) as store:
            asked = store.ask(panels, task=self.task.name)
            for i, (panel, x) in enumerate(zip(asked, panels, strict=True)):
                while store.scores(panel) is None:
                    row = Row(f"Panel {i + 1} of {len(panels)}", x, "A", numbered=True)
                    try:
                        reply, seconds = self.listen(row)
                    except Leave:
                        raise KeyboardInterrupt from None
                    if reply.kind == "undo":
                        self.say("In a run an answer is learned from at once: there is no undo.")
                        continue
                    scores = reply.scores or (None,) * len(x)
                    store.answer(Judgement(panel.samples, scores, self.annotator, seconds))
                    self.say("Kept.")
            return store.recall(panels)[0]

    # The episode.

    @classmethod
    def play(cls, episode: Episode, out: TextIO | None = None, **settings: Any) -> dict[str, Any]:
        """Play an episode until the person leaves; returns the summary.

        Args:
            episode: What is played.
            out: Where words go; None = standard output.
            settings: More of the face's own.
        """
        face = cls(episode.task, out=out, **settings)
        try:
            face.open(episode)
            while True:
                face.turn(episode)
        except (Leave, KeyboardInterrupt):
            face.busy("All answers are kept. Looking at what came of them ...")
        summary = episode.finish()
        print(closing(summary), file=face.out, flush=True)
        return summary

    def open(self, episode: Episode) -> None:
        """The first screen."""
        size, samples = episode.config.panel_size, episode.opening()
        if episode.resumed:
            n = episode.resumed
            self.say(f"Going on after {n} answer{'s' * (n != 1)}; u takes the last one back.")
        note = f"Model A makes {percent(episode.before)}.\n{self.hint(size)}"
        self.show([Row(f"{len(samples)} samples of model A", samples, "A")], note)

    def turn(self, episode: Episode) -> None:
        """One question, its answer, and what comes of it."""
        question = episode.question
        n, x = question.number, question.x
        maker = "model A" if question.by == "A" else "model B, which explores"
        title = f"Question {n}: which of these {len(x)} do you like? (proposals of {maker})"
        reply, seconds = self.listen(Row(title, x, question.by, numbered=True))
        if reply.kind == "undo":
            taken = episode.undo()
            self.say("There is nothing to take back." if taken is None else _told(taken))
            return
        judgement = episode.keep(reply.scores or (None,) * len(x), seconds)
        what = "" if any(reply.scores) else ", none will do" if reply.scores else ", skipped"
        if episode.teaches(judgement):
            self.say(f"Kept: answer {n}{what}.")
            self.busy("Model B learns ...")
        else:
            self.say(f"Kept: answer {n}{what}. Model B stays as it is.")
        self.outcome(episode, question, episode.learn())

    def outcome(self, episode: Episode, question: Question, outcome: Outcome) -> None:
        """What model B makes now, from the panel's noises and from new ones."""
        if not outcome.taught:
            return
        rows = [Row(f"{len(outcome.samples)} new samples of model B", outcome.samples, "B")]
        if outcome.same is not None:
            same = Row("Model B from the same noises", outcome.same, "B", numbered=True)
            rows.insert(0, same)
        after = percent(episode.rates(episode.agent))
        self.show(rows, f"Model A makes {percent(episode.before)};\nmodel B makes {after}.")


def _told(judgement: Judgement) -> str:
    """One line about an answer that was taken back."""
    scores = tuple(s for s in judgement.scores if s is not None)
    what = write(Reply("scores", scores)) or "none will do" if scores else "skipped"
    return f"Taken back: {what}. The question again."
