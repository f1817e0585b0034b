"""``Session``: a page that is being served, with all that belongs to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from oracles.web.board import Board
from oracles.web.oracle import Closed, WebOracle
from oracles.web.questions import Questions
from oracles.web.server import Api, Server, make_app
from prefenv.feedback import FeedbackStore, Panel
from prefenv.tasks import Task


class Session:
    """A feedback file, its questions, its page.

    Args:
        task: The task whose samples are shown.
        store: Where answers are kept; closed with the session.
        token: The page's secret.
        settings: ``host``, ``port``, ``expose``, ``overlap`` and ``repeats`` are read from it.
    """

    def __init__(self, task: Task, store: FeedbackStore, token: str, settings: WebOracle):
        self.task, self.store, self.token, self.settings = task, store, token, settings
        self.questions = Questions(store, token, settings.overlap, settings.repeats)
        self.board = Board(task, store, self.questions)
        self._closed = threading.Event()
        self.api = Api(self.questions, self.board)
        app = make_app(self.api, token, settings.expose)
        try:
            self.server = Server(app, settings.host, settings.port)
        except BaseException:
            store.close()
            raise
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.link = f"http://{host}:{self.server.port}/#{token}"

    def judge(self, panels: Tensor) -> Tensor:
        """See ``WebOracle.judge``."""
        asked = self.store.ask(panels, task=self.task.name)
        self.questions.put(asked)
        self.wait(asked)
        scores, _ = self.store.recall(panels)
        return scores

    def wait(self, panels: Sequence[Panel], until: Callable[[], bool] = lambda: False) -> bool:
        """Wait until panels are answered; then the page says that the model learns. False: ``until()`` came first.

        Raises:
            Closed: ``close()`` was called meanwhile.
        """
        self.board.phase = "asking"
        done = self.questions.wait(panels, lambda: self._closed.is_set() or until())
        if self._closed.is_set():
            raise Closed("the page was closed; all answers are kept, and the same command goes on")
        self.board.phase = "learning"
        return done

    def finish(self, agent: Any) -> None:
        """Show the last picture, and that all is done."""
        self.board.publish(agent, last=True)
        self.board.phase = "done"

    def close(self) -> None:
        """Stop serving, and close the file."""
        self._closed.set()
        self.server.stop()
        self.store.close()
