"""``terminal``: a person at a terminal, who sees samples drawn in braille and types which ones they like.

``prefenv play --oracle terminal`` plays the toy's episode (``prefenv.play``). As the oracle of any other run,
``prefenv align --oracle terminal:path=mine.sqlite``, it asks about every panel; what is in the feedback file is
not asked again, so a run that was stopped goes on without its questions.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from prefenv.play import Episode
from prefenv.play.canvas import Page
from prefenv.play.face import Face, Leave, Row
from prefenv.play.words import BadReplyError, Reply, allowed, read
from prefenv.tasks import Task


class Terminal(Face):
    """A person at a terminal.

    Args:
        task: The task whose samples are judged.
        path: Feedback file of the answers, where it is the oracle of a run.
        annotator: Who answers.
        source: Where lines come from; None = standard input.
        out: Where it draws and speaks; None = standard output.
    """

    def __init__(
        self,
        task: Task,
        path: str = "feedback.sqlite",
        annotator: str = "person",
        *,
        source: TextIO | None = None,
        out: TextIO | None = None,
    ):
        super().__init__(task, path, annotator, out=out)
        self.source = source or sys.stdin or io.StringIO()  # a closed standard input is None
        self.page = Page.of(self.out, os.environ)

    def open(self, episode: Episode) -> None:
        if not self.source.isatty():
            self.say("The input is no terminal: answers are read from it, one a line.")
        super().open(episode)

    def say(self, text: str) -> None:
        self.page.say(text)

    def show(self, rows: Sequence[Row], note: str = "") -> None:
        for row in rows:
            color = "red" if row.by == "A" else "green"
            self.page.say()
            self.page.say(row.title, color)
            labels = [str(i) for i in range(len(row.samples))] if row.numbered else []
            self.page.draw(self.task, row.samples, color, labels)
        if note:
            self.page.say(note)

    def listen(self, row: Row) -> tuple[Reply, float]:
        size, began = len(row.samples), time.monotonic()
        self.show([row])
        while True:
            line = self.line(f"0 to {size - 1}, Enter = none, ? = help > ")
            try:
                reply = read(line, size)
            except BadReplyError as error:
                self.say(str(error))
                continue
            if reply.kind == "quit":
                raise Leave
            if reply.kind != "help":
                return reply, time.monotonic() - began
            self.say(f"Type {allowed(size)}.")

    def line(self, prompt: str) -> str:
        """A line that was typed after the prompt was there.

        Raises:
            Leave: There will be no more.
        """
        with contextlib.suppress(Exception):  # no terminal, or a system without termios
            import termios

            # What was typed while model B learned was meant for nothing that had been seen.
            termios.tcflush(self.source, termios.TCIFLUSH)
        self.page.say(prompt, end="")
        try:
            line = self.source.readline()
        except UnicodeDecodeError:
            return "\ufffd"
        except KeyboardInterrupt:
            line = ""
        if not line:
            self.say("")
            raise Leave
        if not self.source.isatty():
            self.say(line.strip())  # a terminal shows what is typed; a transcript should too
        return line
