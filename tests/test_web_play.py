"""An episode on the page: the agent learns from people, resumes, and unlearns what is taken back; labelling."""

from __future__ import annotations

import json
import socket
import threading
import time
from dataclasses import replace
from http.client import HTTPException
from types import SimpleNamespace

import pytest
import torch
from people import TASK, Person, Playing, linger, samples, weights

from oracles.web import WebOracle
from oracles.web.play import Party
from oracles.web.security import secret
from prefenv.cli import main
from prefenv.feedback import FeedbackStore
from prefenv.flow import RectifiedFlow
from prefenv.packing import unpack
from prefenv.play import PlayConfig
from prefenv.runs import RunConfig, align
from prefenv.testing.probe import Probe

pytest.importorskip("uvicorn")
QUICK = "learned-reward:pool=256,anchors=16,growth=1,updates=10,tolerance=0.0"
CONFIG = PlayConfig(agent=QUICK, panel_size=2, seed=100, steps=4, device="cpu")
AGENTS = (QUICK, "hil-dd:lr=1e-3,data_batch=16,updates=2", "pfm:updates=2,batch=16", "best-of-n:updates=2",
          "ppo", "noise:gradient_steps=1,batch_size=4")  # fmt: skip


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


def party(folder, config=CONFIG, **settings):
    web = WebOracle(TASK, str(folder / "feedback.sqlite"), port=0)
    return web, Party(web, config, folder, **settings)


def test_the_same_answers_make_the_same_model_through_restarts_and_undo(tmp_path):
    def run(folder, stops, undo_at=()):
        """Answers three rounds, closing everything after each round in ``stops``."""
        done = 0
        for stop in (*stops, 3):
            web, p = party(folder, rounds=stop)
            assert len(p.course.learned) == done, "it goes on where it was"
            people = Answering(web.start(), stop - done + len(undo_at), undo_at)
            while people.thread.is_alive() or not p.over:
                if not p.over:
                    p.round()
            result, done = weights(p.course.agent), stop
            web.close()
        return result

    straight = run(tmp_path / "straight", ())
    assert torch.equal(run(tmp_path / "stopped", (1, 2)), straight)
    assert torch.equal(run(tmp_path / "undone", (), undo_at=(1,)), straight)
    with FeedbackStore(tmp_path / "undone" / "feedback.sqlite") as store:
        assert len(store.history()) == 5 and len(store.judgements()) == 3
    web, fresh = party(tmp_path / "fresh")
    assert not torch.equal(weights(fresh.course.agent), straight), "it did learn"
    web.close()


@pytest.mark.parametrize("agent", AGENTS)
def test_none_will_do_teaches_no_agent(agent, tmp_path):
    torch.manual_seed(0)
    reference = RectifiedFlow(Probe().network())
    probe = replace(CONFIG, agent=agent, task="prefenv.testing.probe:Probe")
    for none_teaches in (False, True):
        config = replace(probe, none_teaches=none_teaches)
        web = WebOracle(Probe(), str(tmp_path / str(none_teaches) / "feedback.sqlite"), port=0)
        p = Party(web, config, tmp_path / str(none_teaches), rounds=3, reference=reference)
        ann = Person(web.start())
        for chosen in ([0], []):
            before = kept(p.course.agent)
            thread = threading.Thread(target=lambda a=ann, c=chosen: a.answer(a.wait(60), c))
            thread.start()
            p.round()
            thread.join(60)
            after = kept(p.course.agent)
            if chosen:
                assert before != after, "an answer teaches it"
            elif not none_teaches:
                assert before == after
        assert web.session.store.judgements()[1].scores == (0, 0), "it is kept in any case"
        if agent == QUICK:
            assert len(p.course.agent.answers) == (4 if none_teaches else 2)
        ann.close()
        web.close()


def kept(agent):
    """All weights and optimisers of an agent, and what it makes."""
    parts = [getattr(agent, n) for n in agent.persistent]
    noise = torch.randn(8, *agent.env.task.event_shape, generator=torch.Generator().manual_seed(0))
    return [
        plain([p.state_dict() for p in parts if hasattr(p, "load_state_dict")]),
        agent.sample(noise).tolist(),
    ]


def plain(tree):
    """A tree of tensors as numbers."""
    if isinstance(tree, dict):
        return {k: plain(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [plain(v) for v in tree]
    return tree.tolist() if isinstance(tree, torch.Tensor) else tree


def test_several_annotators_play_an_episode(tmp_path, monkeypatch):
    over = linger(monkeypatch)
    episode = SimpleNamespace(config=CONFIG, folder=tmp_path)
    play = lambda config, folder, out, **settings: WebOracle.play(episode, out, **settings)  # noqa: E731
    monkeypatch.setattr("people.play", play)
    playing = Playing(CONFIG, tmp_path, panels=3, rounds=2, overlap=2)
    link, thread = playing.link, playing.thread
    people = [Person(link, name) for name in ("ann", "bob", "eve")]
    phases = set()
    while thread.is_alive():
        for person in people:
            try:
                if (question := person.next()) is not None:
                    person.answer(question, liked(question))
                state = person.post("state")
                phases.add(state["phase"])
                if "done" in phases:
                    over.set()
            except (OSError, HTTPException):  # it is over
                break
        time.sleep(0.01)
    summary = playing.join()
    assert (summary["answers"], summary["rounds"]) == (12, 2)
    assert "12 answers by 3 annotators; they agree with Krippendorff's alpha 1.00" in "".join(
        playing.said
    )
    assert summary["annotators"] == ["ann", "bob", "eve"] and summary["agreement"]["alpha"] == 1.0
    assert summary["agreement"]["shared"] == 6 and (tmp_path / "summary.json").is_file()
    assert phases >= {"asking", "done"} and state["pictures"]["rates"]["B"].keys() == {
        "roll",
        "s-curve",
    }
    assert len(state["pictures"]["A"]) == len(state["pictures"]["B"]) == 6
    for person in people:
        person.close()


def test_a_run_shows_both_models_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr("oracles.web.board.SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    people = tmp_path / "people"
    web = f"web:path={people}/feedback.sqlite,port={port}"
    run = RunConfig("hil-dd:lr=1e-2,data_batch=16", web, queries=16, rows=8, steps=4, device="cpu")
    thread = threading.Thread(target=align, args=(run, tmp_path / "web"))
    people.mkdir()
    ann = Person(f"http://127.0.0.1:{port}/#{secret(people / 'feedback.token')}")
    thread.start()
    pictures = {}
    for _ in range(4):
        question, until = None, time.monotonic() + 60
        while question is None:
            assert time.monotonic() < until
            try:
                question = ann.next()
            except (OSError, HTTPException):
                ann.close()
            time.sleep(0.02)
        state = ann.post("state")
        pictures[state["rounds"]] = state["pictures"]
        ann.answer(question, liked(question))
    thread.join(60)
    ann.close()
    assert pictures.keys() == {0, 1}
    assert len(pictures[0]["A"]) == 6 and pictures[0]["A"] == pictures[0]["B"], "from the first on"
    assert pictures[1]["A"] == pictures[0]["A"] and pictures[1]["B"] != pictures[0]["B"]
    again = replace(run, oracle=f"replay:path={people}/feedback.sqlite")
    align(again, tmp_path / "replay")
    one, two = (unpack(tmp_path / n / "model.safetensors") for n in ("web", "replay"))
    assert plain(one["parts"]) == plain(two["parts"]), "looking at it changes nothing"
    assert {**one["ledger"], "seconds": 0} == {**two["ledger"], "seconds": 0}


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
