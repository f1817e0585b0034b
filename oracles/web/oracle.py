"""``web``: people judge on a page in their browsers, several at once.

Every panel goes to one annotator (or to ``overlap``), their scores are averaged: 1 = chosen, 0 = not, 1/2 = a
tie, NaN = skipped by all. Answers are kept in a feedback file; what is answered there already is not asked again,
so a run that was stopped goes on. The page and its security: ``oracles.web.server``, ``oracles.web.security``.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from oracles.web.security import secret
from prefenv.errors import ConfigError, PrefenvError
from prefenv.feedback import FeedbackStore
from prefenv.oracle import Oracle
from prefenv.tasks import Task

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Closed(PrefenvError):
    """The page was closed while questions were open; all answers are kept."""


class WebOracle(Oracle):
    """People with browsers. The page is served from the first question on, or from ``start()``.

    Args:
        task: The task whose samples are judged.
        path: The feedback file; its page's token is kept beside it.
        host: Interface to serve; others than this machine's own need ``expose=True``.
        port: Port; 0 = any that is free.
        expose: Serve another interface: whoever has the link and reaches this machine can answer.
        overlap: Annotators who answer each panel.
        repeats: Share of questions that are hidden repeats, in [0, 1).

    Raises:
        ConfigError: A setting out of range, or packages that are missing.
    """

    nondeterministic = True
    unconditional = True

    def __init__(
        self,
        task: Task,
        path: str = "runs/web/feedback.sqlite",
        host: str = "127.0.0.1",
        port: int = 8765,
        expose: bool = False,
        overlap: int = 1,
        repeats: float = 0.0,
    ):
        super().__init__(task)
        if not (isinstance(overlap, int) and overlap >= 1):
            raise ConfigError(f"web: overlap is a number of annotators from 1, not {overlap!r}")
        if not 0 <= repeats < 1:
            raise ConfigError(f"web: repeats is a share in [0, 1), not {repeats!r}")
        if not (isinstance(port, int) and 0 <= port < 65536):
            raise ConfigError(f"web: port is a number from 0 to 65535, not {port!r}")
        if host not in LOOPBACK and not expose:
            raise ConfigError(
                f"web: {host} is open to other machines; expose=True if that is meant"
            )
        self.path, self.host, self.port, self.expose = Path(path), host, port, expose
        self.overlap, self.repeats = overlap, repeats
        self._session: Any = None

    def start(self) -> str:
        """Serve the page, if it is not yet served; returns its link.

        Raises:
            ConfigError: The port cannot be had, or packages are missing.
            FeedbackError: The feedback file cannot be opened.
        """
        if self._session is None:
            try:
                from oracles.web.session import Session
            except ImportError as error:
                raise ConfigError(
                    f"the page needs {error.name}: pip install 'prefenv[web]'"
                ) from None
            if self.host not in LOOPBACK:
                warnings.warn(
                    f"the page is open to whoever reaches {self.host} and has the link, unencrypted",
                    stacklevel=2,
                )
            token = secret(self.path.with_suffix(".token"))
            self._session = Session(self.task, FeedbackStore(self.path), token, self)
        return self._session.link

    @property
    def session(self) -> Any:
        """The page's session, started: its ``store``, ``questions``, ``board`` and ``link``."""
        if self._session is None:
            print(f"answer at {self.start()}", file=sys.stderr, flush=True)
        return self._session

    def judge(self, panels: Tensor) -> Tensor:
        """Ask people about panels ``(m, K, *event_shape)``, and wait for all answers; Ctrl-C interrupts.

        An answer may be taken back and changed later; a run keeps what it has learned from it meanwhile.

        Raises:
            Closed: ``close()`` was called meanwhile.
        """
        return self.session.judge(panels)

    def publish(self, agent: Any, metrics: dict[str, float]) -> None:
        """Show on the page how far an agent is, and samples of both models."""
        self.session.board.publish(agent)

    def close(self) -> None:
        """Stop serving; a ``judge`` that waits raises ``Closed``."""
        if self._session is not None:
            self._session.close()
            self._session = None

    @classmethod
    def play(cls, episode: Any, out: Any = None, **settings: Any) -> dict[str, Any]:
        """Play an episode (``prefenv.play``) on the page until Ctrl-C; see ``oracles.web.play.play``."""
        from oracles.web.play import play

        return play(episode.config, episode.folder, out, **settings)

    @staticmethod
    def label(folder: Path, out: Any = None, **settings: Any) -> dict[str, Any]:
        """Ask about all panels of a folder of samples; see ``oracles.web.label.label``."""
        from oracles.web.label import label

        return label(folder, out, **settings)

    def __deepcopy__(self, memo: Any) -> WebOracle:
        return self  # one page, one file: gymnasium copies an env's settings
