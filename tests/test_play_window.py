"""The window: keys and clicks as the canvas reports them; and a real window where there is a virtual display."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from matplotlib.backend_bases import CloseEvent, KeyEvent, MouseEvent
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from oracles.window import Window, new_figure
from prefenv.cli import main
from prefenv.errors import ConfigError
from prefenv.feedback import FeedbackStore
from prefenv.flow import RectifiedFlow
from prefenv.play import Episode, PlayConfig
from prefenv.play.face import Leave, Row
from prefenv.registry import make_task
from prefenv.testing.probe import Probe


class Canvas(FigureCanvasAgg):
    """A canvas whose event loop plays a list: keys, ``("click", sample)``, ``("double", sample)``, ``"CLOSE"``."""

    def __init__(self, figure):
        super().__init__(figure)
        self.events, self.notes = [], []
        self.window = None

    def start_event_loop(self, timeout=0):
        assert self.events, "the window waits for an event that never comes"
        self.notes.append(self.window.note.get_text())
        event = self.events.pop(0)
        if event == "CLOSE":
            self.callbacks.process("close_event", CloseEvent("close_event", self))
        elif isinstance(event, tuple):
            how, sample = event
            axes = self.window.frames[sample][0]
            x, y = axes.transAxes.transform((0.4, 0.6))
            mouse = MouseEvent("button_press_event", self, x, y, 1, dblclick=how == "double")
            self.callbacks.process("button_press_event", mouse)
        else:
            self.callbacks.process("key_press_event", KeyEvent("key_press_event", self, event))


@pytest.fixture
def canvas():
    return Canvas(Figure(figsize=(6, 4)))


def window(canvas, events, task=None, **settings):
    canvas.window = Window(task or make_task("shapes"), figure=canvas.figure, **settings)
    canvas.events = list(events)
    return canvas.window


def heard(canvas, events, size=4):
    """What a window understands."""
    task = make_task("shapes")
    x, _ = task.data(size, torch.Generator().manual_seed(0))
    reply, seconds = window(canvas, events, task).listen(Row("which?", x, "A", numbered=True))
    assert seconds >= 0 and canvas.events == []
    return reply.scores or reply.kind


@pytest.mark.parametrize(
    ("events", "want"),
    [
        (["0", "3", "enter"], (1, 0, 0, 1)),
        ([("click", 1), "enter"], (0, 1, 0, 0)),
        ([("click", 1), ("click", 2), ("click", 1), "enter"], (0, 0, 1, 0)),
        (["0", "1", "0", "return"], (0, 1, 0, 0)),
        (["0", "1", "backspace", "enter"], (1, 0, 0, 0)),
        (["0", "1", "escape", "enter"], (0, 0, 0, 0)),
        (["enter"], (0, 0, 0, 0)),
        (["0", ("double", 2)], (0, 0, 1, 0)),
        (["p", " ", "0", ".", "5", "space", "1", "enter"], (0.5, 1, 0, 0)),
        (["p", ".", "5", "2", "backspace", "enter"], (0.5, 0, 0, 0)),
        (["p", "1", "escape", "2", "enter"], (0, 0, 1, 0)),
        (["2", "shift", "control", "f5", None, "enter"], (0, 0, 1, 0)),
        (["u"], "undo"),
        (["1", "s"], "skip"),
    ],
)
def test_keys_and_clicks(events, want, canvas):
    assert heard(canvas, events) == want


def test_what_is_taken_is_framed(canvas):
    heard(canvas, ["0", ("click", 2), "enter"])
    assert [frame.get_visible() for _, frame in canvas.window.frames] == [True, False, True, False]
    assert canvas.notes[-1].endswith("\n0 2")


def test_a_click_beside_the_samples_takes_none(canvas):
    def miss():
        mouse = MouseEvent("button_press_event", canvas, 1, 1, 1)
        canvas.callbacks.process("button_press_event", mouse)

    start = canvas.start_event_loop
    canvas.start_event_loop = lambda timeout=0: (
        miss() if canvas.events[0] == "MISS" and canvas.events.pop(0) else start(timeout)
    )
    assert heard(canvas, ["MISS", "enter"]) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("events", "words"),
    [
        (["x", "u"], "cannot read 'x'. Allowed: numbers 0 to 3"),
        (["7", "u"], "there is no sample 7"),
        (["p", "enter", "escape", "u"], "p wants numbers"),
        (["p", "2", "enter", "escape", "u"], "'2' is no number from 0 to 1"),
        (["?", "u"], "number or click: take"),
    ],
)
def test_a_bad_key_is_told_and_the_question_stays(events, words, canvas):
    assert heard(canvas, events) == "undo"
    assert any(words in note for note in canvas.notes)


@pytest.mark.parametrize("event", ["q", "CLOSE"])
def test_leaving(event, canvas):
    with pytest.raises(Leave):
        heard(canvas, [event])


def test_events_from_before_the_question_answer_nothing(canvas):
    task = make_task("shapes")
    x, _ = task.data(4, torch.Generator())
    w = window(canvas, ["1", "enter"], task)
    w.say("Model B learns ...")
    canvas.callbacks.process("key_press_event", KeyEvent("key_press_event", canvas, "enter"))
    reply, _ = w.listen(Row("which?", x, "A", numbered=True))
    assert reply.scores == (0, 1, 0, 0)


def test_the_episode(canvas, tmp_path):
    torch.manual_seed(0)
    config = PlayConfig(
        agent="hil-dd:lr=1e-3,data_batch=16",
        task="prefenv.testing.probe:Probe",
        steps=8,
        device="cpu",
    )
    out = io.StringIO()

    class Watched(Window):
        shown: list = []

        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            canvas.window = self

        def draw(self, rows, note):
            self.shown.append([(row.title.split("?")[0], row.by, len(row.samples)) for row in rows])
            super().draw(rows, note)

    canvas.events = ["enter", "0", "enter", " ", "enter", "s", "u", "u", "2", "CLOSE"]
    with Episode(config, tmp_path, RectifiedFlow(Probe().network())) as episode:
        summary = Watched.play(episode, out, figure=canvas.figure)
        assert [j.scores for j in episode.store.judgements()] == [(1, 0, 0, 0)]
    question = "Question {}: which of these 4 do you like".format
    assert Watched.shown == [
        [("6 samples of model A", "A", 6)],
        [(question(1), "A", 4)],
        [("Model B from the same noises", "B", 4), ("6 new samples of model B", "B", 6)],
        [(question(2), "A", 4)],
        [(question(3), "A", 4)],
        [(question(4), "A", 4)],
        [(question(3), "A", 4)],
        [(question(2), "A", 4)],
    ]
    assert summary["answers"] == 1 and summary["undone"] == 2
    assert "1 answer (1 choice" in out.getvalue()


def test_the_oracle_of_a_run(canvas, tmp_path):
    path = str(tmp_path / "f.sqlite")
    x, _ = make_task("shapes").data(8, torch.Generator().manual_seed(0))
    person = window(canvas, ["0", "enter", "s"], path=path)
    got = person.judge(x.view(2, 4, 64, 2))
    assert got[0].tolist() == [1, 0, 0, 0] and bool(got[1].isnan().all())


def test_without_a_screen_it_is_one_line(monkeypatch, capsys, tmp_path):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="use --oracle terminal"):
        new_figure()
    argv = ["play", "--oracle", "window", "--agent", "hil-dd", "--out", str(tmp_path)]
    assert main([*argv, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert "Getting ready" in out and err.count("\n") == 1 and "--oracle terminal" in err


# A real window: Tk's own events, on a virtual display.
_REAL = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from oracles.window import Window, new_figure
from prefenv.play import Episode, PlayConfig

figure = new_figure()
tk, window = figure.canvas.get_tk_widget(), figure.canvas.manager.window
script = ["<Return>", "<x>", 1, "<Return>", "<Return>", "<u>"]
script += ["<p>", "<period>", "<Key-5>", "<Return>", "<Return>", None]

class Scripted(Window):
    def event(self):
        step = script.pop(0)
        def go():
            tk.focus_force()
            if step is None:
                window.tk.call(window.protocol("WM_DELETE_WINDOW"))
            elif isinstance(step, int):
                x, y = self.frames[step][0].transAxes.transform((0.5, 0.5))
                tk.event_generate("<Button-1>", x=int(x), y=int(figure.bbox.height - y))
            else:
                tk.event_generate(step)
        window.after(50, go)
        return super().event()

config = PlayConfig(agent="hil-dd", seed=100, device="cpu")
with Episode(config, Path(sys.argv[1])) as episode:
    summary = Scripted.play(episode, sys.stderr, figure=figure)
print(json.dumps(summary))
"""


@pytest.fixture
def display():
    if shutil.which("Xvfb") is None:
        pytest.skip("no Xvfb here: apt-get install xvfb")
    pytest.importorskip("tkinter", reason="this Python has no tkinter")
    read, write = os.pipe()
    argv = ["Xvfb", "-displayfd", str(write), "-screen", "0", "1280x900x24"]
    server = subprocess.Popen(argv, pass_fds=[write], stderr=subprocess.DEVNULL)
    os.close(write)
    yield ":" + os.read(read, 16).decode().strip()
    os.close(read)
    server.terminate()
    server.wait(timeout=60)


def test_a_real_window(display, tmp_path):
    environ = {**os.environ, "DISPLAY": display, "MPLBACKEND": "TkAgg", "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    argv = [sys.executable, "-c", _REAL, str(tmp_path)]
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{done.stderr} after {time.monotonic() - began:.0f} s"
    with FeedbackStore(tmp_path / "feedback.sqlite", readonly=True) as store:
        assert [j.scores for j in store.judgements()] == [(0.5, 0, 0, 0)]
        assert len(store.history()) == 3
