"""An episode on the page: the agent learns from people, resumes, and unlearns what is taken back; labelling."""

from __future__ import annotations

import json
import socket
import threading
import time
from http.client import HTTPException
from types import SimpleNamespace

import pytest
import torch
from people import TASK, Person, samples

from oracles.web import WebOracle
from oracles.web.play import Course
from oracles.web.security import secret
from prefenv.cli import main
from prefenv.feedback import FeedbackStore

pytest.importorskip("uvicorn")
CONFIG = SimpleNamespace(
    agent="learned-reward:pool=256,anchors=16,growth=1,updates=10,tolerance=0.0", task="shapes", panel_size=2,
    seed=100, steps=4, checkpoint=None, device="cpu", none_teaches=False,
)  # fmt: skip


def liked(question):
    """Chooses what is an S curve, as one person would whatever the order."""
    x = torch.tensor(question["samples"])
    r = TASK.residuals(x)
    return [int((r[:, 0] - r[:, 1]).argmax())]


class Answering:
    """An annotator in a thread, who answers ``rounds`` questions and may take some back."""

    def __init__(self, link, n, undo_at=()):
        self.person, self.seen = Person(link), []
        self.thread = threading.Thread(target=self.run, args=(n, undo_at), daemon=True)
        self.thread.start()

    def run(self, n, undo_at):
        for i in range(n):
            question = self.person.wait(60)
            self.seen.append(question["id"])
            # Before the answer is taken back, it is the wrong one.
            self.person.answer(question, "skip" if i in undo_at else liked(question))
            if i in undo_at:
                self.person.wait(60)  # the agent has learned from it, and asks on
                self.person.post("undo")
        self.person.close()


def course(folder, **settings):
    web = WebOracle(TASK, str(folder / "feedback.sqlite"), port=0, restart=True)
    return web, Course(web, CONFIG, folder, **settings)


def weights(agent):
    return torch.cat([p.detach().flatten() for p in agent.model.parameters()])


def test_the_same_answers_make_the_same_model_through_restarts_and_undo(tmp_path):
    from oracles.web import Stale

    def run(folder, stops, undo_at=()):
        """Answers three rounds, closing everything after each round in ``stops``."""
        done = 0
        for stop in (*stops, 3):
            web, c = course(folder)
            assert len(c.rounds) == done, "it goes on where it was"
            people = Answering(web.start(), stop - done + len(undo_at), undo_at)
            while len(c.rounds) < stop or people.thread.is_alive():
                try:
                    c.round()
                except Stale:
                    c.rebuild()
                if len(c.rounds) == stop and not web.session.questions.stale:
                    break
            people.thread.join(20)
            result, done = weights(c.agent), stop
            c.close()
            web.close()
        return result

    straight = run(tmp_path / "straight", ())
    assert torch.equal(run(tmp_path / "stopped", (1, 2)), straight)
    assert torch.equal(run(tmp_path / "undone", (), undo_at=(1,)), straight)
    with FeedbackStore(tmp_path / "undone" / "feedback.sqlite") as store:
        assert len(store.history()) == 5 and len(store.judgements()) == 3
    env = course(tmp_path / "fresh")[1]
    assert not torch.equal(weights(env.agent), straight), "it did learn"
    env.close()


def test_none_will_do_teaches_nothing(tmp_path):
    for none_teaches in (False, True):
        folder = tmp_path / str(none_teaches)
        web = WebOracle(TASK, str(folder / "feedback.sqlite"), port=0)
        c = Course(web, SimpleNamespace(**{**vars(CONFIG), "none_teaches": none_teaches}), folder)
        before, ann = weights(c.agent), Person(web.start())
        thread = threading.Thread(target=lambda a=ann: a.answer(a.wait(60), []))
        thread.start()
        c.round()
        thread.join(10)
        assert (len(c.agent.answers) == 2) == none_teaches
        assert torch.equal(weights(c.agent), before) or none_teaches
        assert web.session.store.judgements()[0].scores == (0, 0), "it is kept in any case"
        ann.close()
        c.close()
        web.close()


def test_several_annotators_play_an_episode(tmp_path, monkeypatch):
    monkeypatch.setattr("oracles.web.play.LINGER", 0.5)
    said, result = [], []
    out = SimpleNamespace(write=said.append, flush=lambda: None)
    episode = SimpleNamespace(config=CONFIG, folder=tmp_path)
    settings = {"port": 0, "panels": 3, "rounds": 2, "overlap": 2}
    thread = threading.Thread(
        target=lambda: result.append(WebOracle.play(episode, out, **settings))
    )
    thread.start()
    while not said:
        time.sleep(0.01)
    link = next(w for w in said[0].split() if w.startswith("http"))
    people = [Person(link, name) for name in ("ann", "bob", "eve")]
    phases = set()
    while thread.is_alive():
        for person in people:
            try:
                if (question := person.next()) is not None:
                    person.answer(question, liked(question))
                state = person.post("state")
                phases.add(state["phase"])
            except (OSError, HTTPException):  # it is over
                break
        time.sleep(0.01)
    thread.join()
    (summary,) = result
    assert (summary["answers"], summary["rounds"]) == (12, 2)
    assert "12 answers by 3 annotators; they agree with Krippendorff's alpha 1.00" in "".join(said)
    assert summary["annotators"] == ["ann", "bob", "eve"] and summary["agreement"]["alpha"] == 1.0
    assert summary["agreement"]["shared"] == 6 and (tmp_path / "summary.json").is_file()
    assert phases >= {"asking", "done"} and state["pictures"]["rates"]["B"].keys() == {
        "roll",
        "s-curve",
    }
    assert len(state["pictures"]["A"]) == len(state["pictures"]["B"]) == 6
    for person in people:
        person.close()


# Labelling samples that lie ready


def test_labelling_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("oracles.web.play.LINGER", 0.3)
    with FeedbackStore(tmp_path / "feedback.sqlite") as store:
        panels = store.ask(samples(8), task="shapes")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    link = f"http://127.0.0.1:{port}/#{secret(tmp_path / 'feedback.token')}"
    codes = []
    command = ["label", str(tmp_path), "--port", str(port), "--overlap", "2", "--repeats", "0"]
    thread = threading.Thread(target=lambda: codes.append(main([*command, "--json"])))
    thread.start()
    people, said = [Person(link, name) for name in ("ann", "bob")], 0
    while thread.is_alive():
        for person in people:
            try:
                if (question := person.next()) is not None:
                    person.answer(question, liked(question))
                    said += 1
            except (OSError, HTTPException):
                person.close()
                time.sleep(0.05)
    thread.join()
    told = json.loads(capsys.readouterr().out)
    assert codes == [0] and said == 16
    assert (told["panels"], told["answered"], told["answers"]) == (8, 8, 16)
    assert told["annotators"] == ["ann", "bob"]
    with FeedbackStore(tmp_path / "feedback.sqlite") as store:
        for panel, x in zip(panels, samples(8), strict=True):
            r = TASK.residuals(x)
            best = int((r[:, 0] - r[:, 1]).argmax())
            assert store.scores(panel) == {s: float(i == best) for i, s in enumerate(panel.samples)}
    for person in people:
        person.close()


def test_nothing_to_label(tmp_path, capsys):
    assert main(["label", str(tmp_path)]) == 2
    assert "no feedback file" in capsys.readouterr().err
    FeedbackStore(tmp_path / "feedback.sqlite").close()
    assert main(["label", str(tmp_path)]) == 2
    assert "prefenv sample" in capsys.readouterr().err
    with FeedbackStore(tmp_path / "feedback.sqlite") as store:
        store.ask(samples(1))
    assert main(["label", str(tmp_path), "--host", "0.0.0.0"]) == 2
    assert "expose" in capsys.readouterr().err
