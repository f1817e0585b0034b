"""``window``: a person before a matplotlib window, who answers with keys or clicks.

A digit or a click takes a sample, or puts it back; Enter sends (with none taken: none will do), a double click
takes one and sends; u, s and q are undo, skip and quit, ? help; p begins a line of numbers, as in the terminal.
Samples beyond 9 are taken by clicks.

``prefenv play --oracle window`` plays the toy's episode (``prefenv.play``); ``prefenv align --oracle window`` asks
about every panel of a run. Without a screen: ``--oracle terminal``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any, TextIO

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from prefenv import plotting
from prefenv.errors import ConfigError
from prefenv.play.face import Face, Leave, Row
from prefenv.play.words import BadReplyError, Reply, allowed, read
from prefenv.tasks import Task

_COLORS = {"A": plotting.RED, "B": plotting.GREEN}
_HINT = "number or click: take · Enter: send (none = none will do) · u undo · s skip · q quit · ?"


def new_figure() -> Figure:
    """A figure with a window around it.

    Raises:
        ConfigError: There is no screen.
    """
    import matplotlib.pyplot as plt

    none = "no screen for a window here; use --oracle terminal, or ssh -X"
    try:
        with plt.rc_context({"toolbar": "None"}):
            figure = plt.figure("prefenv play", figsize=(9, 6))
    except Exception as error:  # each toolkit has its own
        raise ConfigError(f"{none} ({error})") from None
    if figure.canvas.required_interactive_framework is None:
        plt.close(figure)
        raise ConfigError(f"{none} (matplotlib draws with {plt.get_backend()})")
    if (manager := figure.canvas.manager) is not None:
        # Or s would save the figure, q close it, p pan, and so on.
        if manager.key_press_handler_id is not None:
            figure.canvas.mpl_disconnect(manager.key_press_handler_id)
        manager.show()
    return figure


class Window(Face):
    """A person before a window.

    Args:
        task: The task whose samples are judged.
        path: Feedback file of the answers, where it is the oracle of a run.
        annotator: Who answers.
        out: Where the closing summary is printed; None = standard output.
        figure: What is drawn on; None = a new window, once there is something to show.
    """

    def __init__(
        self,
        task: Task,
        path: str = "feedback.sqlite",
        annotator: str = "person",
        *,
        out: TextIO | None = None,
        figure: Figure | None = None,
    ):
        super().__init__(task, path, annotator, out=out)
        self.given = figure
        self.heard: list[Any] = []
        self.closed = False
        self.taken: list[int] = []
        self.text = ""  # what was typed behind a p
        self.frames: list[tuple[Any, Rectangle]] = []
        self.said = ""  # since something was drawn last: what is drawn next shows it too

    @cached_property
    def figure(self) -> Figure:
        """Where it draws.

        Raises:
            ConfigError: There is no screen.
        """
        figure = self.given or new_figure()
        for name in ("key_press_event", "button_press_event", "close_event"):
            figure.canvas.mpl_connect(name, self.hear)
        figure.text(0.5, 0.5, "", ha="center")
        return figure

    @property
    def canvas(self) -> Any:
        """The figure's."""
        return self.figure.canvas

    @property
    def note(self) -> Any:
        """The line at the foot: the figure's last text."""
        return self.figure.texts[-1]

    # Events.

    def hear(self, event: Any) -> None:
        """Take note of a key, a click or the window's end."""
        self.closed |= event.name == "close_event"
        self.heard.append(event)
        self.canvas.stop_event_loop()

    def event(self) -> Any:
        """The next event.

        Raises:
            Leave: The window is closed.
        """
        while not self.heard and not self.closed:
            self.canvas.draw_idle()
            self.canvas.start_event_loop(0)
        if self.closed:
            raise Leave
        return self.heard.pop(0)

    # The face.

    def say(self, text: str) -> None:
        self.said = text
        self.busy(text)

    def hint(self, size: int) -> str:
        return f"You are asked next: {_HINT} help"

    def busy(self, text: str) -> None:
        self.note.set_text(text)
        self.update()

    def show(self, rows: Sequence[Row], note: str = "") -> None:
        self.draw(rows, f"{note}\nAny key or click goes on; q quits.")
        self.heard.clear()
        event = self.event()
        if getattr(event, "key", None) == "q":
            raise Leave

    def listen(self, row: Row) -> tuple[Reply, float]:
        self.draw([row], _HINT)
        self.taken, self.text, began = [], "", time.monotonic()
        self.heard.clear()  # what came before was meant for nothing that had been seen
        while True:
            event = self.event()
            line = self.click(event) if event.name == "button_press_event" else self.key(event)
            self.mark()
            if line is None:
                continue
            try:
                reply = read(line, len(row.samples))
            except BadReplyError as error:
                self.say(str(error))
                continue
            if reply.kind == "quit":
                raise Leave
            if reply.kind != "help":
                return reply, time.monotonic() - began
            self.say(f"{_HINT}\nAs a line: {allowed(len(row.samples))}")

    def click(self, event: Any) -> str | None:
        """Take the sample under the pointer or put it back; a double click sends it alone."""
        hit = [i for i, (axes, _) in enumerate(self.frames) if event.inaxes is axes]
        if not hit or event.button != 1:
            return None
        self.text = ""
        if event.dblclick:
            self.taken = hit
            return str(hit[0])
        self.toggle(hit[0])
        return None

    def key(self, event: Any) -> str | None:
        """What a key does; returns a whole line once there is one."""
        key = event.key or ""
        if key in ("enter", "return"):
            return self.text or " ".join(map(str, sorted(self.taken)))
        if key == "escape":
            self.text, self.taken = "", []
        elif key == "backspace":
            self.text, self.taken = self.text[:-1], self.taken if self.text else self.taken[:-1]
        elif self.text or key == "p":
            self.text += " " if key == "space" else key if len(key) == 1 else ""
        elif key in ("u", "s", "q", "h", "?"):
            return key
        elif key.isdecimal() and key.isascii() and int(key) < len(self.frames):
            self.toggle(int(key))
        elif len(key) == 1:
            return key  # no answer: the reader says what is
        return None

    def toggle(self, index: int) -> None:
        """Take a sample, or put it back."""
        self.taken = [i for i in self.taken if i != index] + [index] * (index not in self.taken)

    # Drawing.

    def draw(self, rows: Sequence[Row], note: str) -> None:
        """Rows of samples, one below the other, and a note at the foot."""
        self.figure.clear()
        self.frames = []
        height = 0.88 / len(rows)
        for i, row in enumerate(rows):
            color, n = _COLORS[row.by], len(row.samples)
            top, lines = 1 - i * height, 2 if len(rows) == 1 and n > 3 else 1
            columns, tall = -(-n // lines), (height - 0.06) / lines
            self.figure.text(0.5, top - 0.03, row.title, color=color, ha="center", va="center")
            for j, sample in enumerate(row.samples.cpu().numpy()):
                left, bottom = j % columns / columns, top - 0.06 - (j // columns + 1) * tall
                axes = self.figure.add_axes(
                    (left + 0.01, bottom + 0.01, 1 / columns - 0.02, tall - 0.02)
                )
                axes.set_axis_off()
                self.task.draw(axes, sample, color)
                frame = Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, lw=3)
                frame.set(edgecolor=plotting.BLUE, visible=False, clip_on=False)
                axes.add_patch(frame)
                if row.numbered:
                    axes.text(0.03, 0.97, str(j), transform=axes.transAxes, va="top", fontsize=14)
                    self.frames.append((axes, frame))
        note, self.said = f"{self.said}\n{note}".strip(), ""
        self.figure.text(0.5, 0.06, note, ha="center", va="center", fontsize=9, wrap=True)
        self.update()

    def update(self) -> None:
        """Bring the figure to the screen at once."""
        if not self.closed:
            self.canvas.draw()
            self.canvas.flush_events()

    def mark(self) -> None:
        """Show what is taken and typed."""
        for i, (_, frame) in enumerate(self.frames):
            frame.set_visible(i in self.taken)
        typed = self.text or " ".join(map(str, sorted(self.taken)))
        self.note.set_text(f"{_HINT}\n{typed}")
        self.canvas.draw_idle()

    @classmethod
    def play(cls, episode: Any, out: TextIO | None = None, **settings: Any) -> dict[str, Any]:
        """As ``Face.play``; the window closes at the end."""
        try:
            return super().play(episode, out, **settings)
        finally:
            with contextlib.suppress(ImportError):
                import matplotlib.pyplot as plt

                plt.close("prefenv play")
