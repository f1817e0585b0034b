"""``terminal``: a person at a terminal, who sees samples drawn in braille and types what they like.

``prefenv play --oracle terminal`` plays the toy's episode (``prefenv.play``). As the oracle of any other run,
``prefenv align --oracle terminal:path=mine.sqlite``, it asks about every panel; what is in the feedback file is not
asked again, so a run that was stopped goes on without its questions.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Any, TextIO

from torch import Tensor

from prefenv.feedback import FeedbackStore, Judgement
from prefenv.oracle import Oracle
from prefenv.play import Episode, Outcome, Question
from prefenv.play.canvas import Page
from prefenv.play.report import closing, percent
from prefenv.play.words import BadReplyError, Reply, allowed, read, write
from prefenv.tasks import Task


class Leave(Exception):
    """The person wants to go: by q, Ctrl-C, or the end of the input."""


class Terminal(Oracle):
    """A person at a terminal.

    Args:
        task: The task whose samples are judged.
        path: Feedback file of the answers, where it is the oracle of a run.
        annotator: Who answers.
        source: Where lines come from; None = standard input.
        out: Where it draws; None = standard output.
    """

    nondeterministic = True

    def __init__(
        self,
        task: Task,
        path: str = "feedback.sqlite",
        annotator: str = "person",
        *,
        source: TextIO | None = None,
        out: TextIO | None = None,
    ):
        super().__init__(task)
        self.path, self.annotator = path, annotator
        self.source, self.page = source or sys.stdin, Page.of(out or sys.stdout, os.environ)

    # As the oracle of a run.

    def judge(self, panels: Tensor) -> Tensor:
        """Ask about panels ``(m, K, *event_shape)``; skipped ones are NaN.

        Raises:
            KeyboardInterrupt: The person left; what was answered is kept.
        """
        with FeedbackStore(self.path) as store:
            for panel, x in zip(store.ask(panels, task=self.task.name), panels, strict=True):
                if store.scores(panel) is not None:
                    continue
                self.page.say("\nWhich of these do you like?")
                try:
                    reply, seconds = self.listen(x, "red")
                    while reply.kind == "undo":
                        self.page.say("In a run an answer is learned from at once: no undo here.")
                        reply, seconds = self.listen(x, "red")
                except Leave:
                    raise KeyboardInterrupt from None
                scores = reply.scores or (None,) * len(x)
                store.answer(Judgement(panel.samples, scores, self.annotator, seconds))
            return store.recall(panels)[0]

    # Talking.

    def line(self, prompt: str) -> str:
        """A line that was typed after the prompt was there.

        Raises:
            Leave: There will be no more.
        """
        # What was typed while model B learned was meant for nothing that had been seen.
        with contextlib.suppress(Exception):
            import termios

            termios.tcflush(self.source, termios.TCIFLUSH)
        self.page.say(prompt, end="")
        try:
            line = self.source.readline()
        except UnicodeDecodeError:
            return "\ufffd"
        except KeyboardInterrupt:
            line = ""
        if not line:
            self.page.say()
            raise Leave
        if not self.source.isatty():
            self.page.say(line.strip())  # so that a transcript shows it
        return line

    def listen(self, x: Tensor, color: Any) -> tuple[Reply, float]:
        """Show a panel ``(K, *event_shape)`` and ask until there is an answer.

        Returns:
            The reply (scores, undo or skip), and the seconds it took.
        """
        began, size = time.monotonic(), len(x)
        self.page.draw(self.task, x, color, [str(i) for i in range(size)])
        while True:
            line = self.line(f"numbers, Enter = none, ? = help [0-{size - 1}] > ")
            try:
                reply = read(line, size)
            except BadReplyError as error:
                self.page.say(str(error))
                continue
            if reply.kind == "quit":
                raise Leave
            if reply.kind != "help":
                return reply, time.monotonic() - began
            self.page.say(f"Type {allowed(size)}.")

    # The episode.

    @classmethod
    def play(
        cls, episode: Episode, source: TextIO | None = None, out: TextIO | None = None
    ) -> dict[str, Any]:
        """Play an episode to its end; returns the summary."""
        face = cls(episode.task, source=source, out=out)
        page = face.page
        try:
            face.open(episode)
            while True:
                face.turn(episode)
        except (Leave, KeyboardInterrupt):
            page.say("All answers are kept. Looking at what came of them ...")
        summary = episode.finish()
        page.say(closing(summary))
        return summary

    def open(self, episode: Episode) -> None:
        """The first screen."""
        config, page = episode.config, self.page
        if not self.source.isatty():
            page.say("No terminal at the input: reading answers from it, one a line.")
        if episode.resumed:
            page.say(f"Going on after {episode.resumed} answers; u takes the last one back.")
        page.say(f"\n{config.shown} samples of model A:", "red")
        page.draw(self.task, episode.opening(), "red")
        page.say(f"Model A makes {percent(episode.before)}.")
        page.say(f"\nTell which samples you like. Type {allowed(config.panel_size)}.")

    def turn(self, episode: Episode) -> None:
        """One question, its answer, and what comes of it."""
        question, page = episode.question, self.page
        color = "red" if question.by == "A" else "green"
        maker = "model A" if question.by == "A" else "model B, which explores"
        page.say(f"\nQuestion {question.number}: {len(question.x)} proposals of {maker}.", color)
        reply, seconds = self.listen(question.x, color)
        if reply.kind == "undo":
            taken = episode.undo()
            page.say("There is nothing to take back." if taken is None else told(taken))
            return
        episode.keep(reply.scores or (None,) * len(question.x), seconds)
        n = question.number
        if reply.kind == "skip":
            page.say(f"Kept: answer {n}, skipped.")
        elif not any(reply.scores):
            page.say(f"Kept: answer {n}, none will do.")
        else:
            page.say(f"Kept: answer {n}. Model B learns ...")
        self.show(episode, question, episode.learn())

    def show(self, episode: Episode, question: Question, outcome: Outcome) -> None:
        """What model B makes now."""
        page = self.page
        if not outcome.taught:
            page.say("Model B stays as it is; here are others.")
            return
        if outcome.same is not None:
            names = [str(i) for i in range(len(question.x))]
            page.say("\nModel B from the same noises:", "green")
            page.draw(self.task, outcome.same, "green", names)
        page.say(f"\n{len(outcome.samples)} new samples of model B:", "green")
        page.draw(self.task, outcome.samples, "green")
        page.say(f"Model A makes {percent(episode.before)};")
        page.say(f"model B makes {percent(episode.rates(episode.agent))}.")


def told(judgement: Judgement) -> str:
    """One line about an answer that was taken back."""
    scores = [s for s in judgement.scores if s is not None]
    what = write(Reply("scores", tuple(scores))) if scores else "skipped"
    return f"Taken back: {what or 'none will do'}. The question again:"
