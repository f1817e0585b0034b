"""People at the annotation page, without a browser; and agents that learn as slowly as a test wants."""

from __future__ import annotations

import http.client
import json
import threading
import time
from types import SimpleNamespace
from urllib.parse import urlsplit

import torch

from agents.awm import AWM
from agents.hil_dd import HilDD
from agents.learned_reward import LearnedReward
from oracles.web import WebOracle
from oracles.web.play import play
from prefenv.feedback import Judgement
from prefenv.play.ahead import make_course
from prefenv.tasks.shapes import Shapes

TASK = Shapes()
HELD = (  # agents that learn as slowly as a test wants
    "people:HeldHilDD:lr=1e-3,data_batch=16,updates=2",
    "people:HeldReward:pool=256,anchors=16,growth=1,updates=10,tolerance=0.0",
)


def samples(m, k=2, seed=0):
    """Panels ``(m, k, 64, 2)`` of real shapes."""
    return TASK.data(m * k, torch.Generator().manual_seed(seed))[0].unflatten(0, (m, k))


def oracle(folder, **settings):
    """A web oracle on any free port; its file lies in the folder."""
    return WebOracle(TASK, str(folder / "feedback.sqlite"), **{"port": 0, **settings})


class Person:
    """One annotator with a connection of their own."""

    def __init__(self, link, name="ann"):
        url = urlsplit(link)
        self.host, self.port, self.token, self.name = url.hostname, url.port, url.fragment, name
        self._connection = http.client.HTTPConnection(self.host, self.port, timeout=60)

    def request(self, method, path, body=b"", **headers):
        """Status and text of any request; underscores in names of headers are hyphens, None = leave it out."""
        given = {"Host": f"127.0.0.1:{self.port}", "X-Token": self.token}
        given |= {k.replace("_", "-"): v for k, v in headers.items()}
        wire = self._connection
        wire.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in {"Content-Length": str(len(body)), **given}.items():
            if value is not None:
                wire.putheader(name, value)
        wire.endheaders(body)
        response = wire.getresponse()
        self.headers = response.headers
        return response.status, response.read().decode()

    def post(self, call, **body):
        """What the API says, which must be yes."""
        status, text = self.request(
            "POST", f"/api/{call}", json.dumps({"annotator": self.name, **body}).encode()
        )
        assert status == 200, (status, text)
        return json.loads(text)

    def refused(self, call, **body):
        """The status of a refusal."""
        data = json.dumps({"annotator": self.name, **body}).encode()
        return self.request("POST", f"/api/{call}", data)[0]

    def next(self):
        return self.post("next")["question"]

    def wait(self, seconds=60):
        """The next question, as soon as there is one."""
        until = time.monotonic() + seconds
        while (question := self.next()) is None:
            assert time.monotonic() < until, "nothing was asked"
            time.sleep(0.02)
        return question

    def answer(self, question, answer, seconds=1.0):
        return self.post("answer", question=question["id"], answer=answer, seconds=seconds)

    def close(self):
        self._connection.close()


class Held:
    """An agent that does not end its learning before it may, so that a test decides what happens meanwhile.

    Attributes:
        began: Set where it has begun to learn from a round; a test clears it.
        may: While set, it does not wait.
    """

    began, may = threading.Event(), threading.Event()

    @classmethod
    def hold(cls):
        cls.began.clear()
        cls.may.clear()

    @classmethod
    def wait(cls):
        cls.began.set()
        assert cls.may.wait(60), "the test lets it wait"


class HeldHilDD(HilDD):
    """An offline agent that waits before it learns."""

    def update(self, rollout):
        Held.wait()
        return super().update(rollout)


class HeldReward(LearnedReward):
    """The agent that chooses its questions, and waits before it learns."""

    def improve(self):
        Held.wait()
        return super().improve()


class HeldAWM(AWM):
    """An online agent that waits before it learns."""

    def update(self, rollout):
        Held.wait()
        return super().update(rollout)


class Playing:
    """``prefenv play --oracle web`` in a thread, until all rounds are played."""

    def __init__(self, config, folder, **settings):
        self.said, self.result = [], []
        out = SimpleNamespace(write=self.said.append, flush=lambda: None)
        settings = {"port": 0, **settings}
        self.thread = threading.Thread(
            target=lambda: self.result.append(play(config, folder, out, **settings)), daemon=True
        )
        self.thread.start()
        until = time.monotonic() + 60
        while not self.said:
            assert time.monotonic() < until and self.thread.is_alive()
            time.sleep(0.01)
        self.link = next(w for w in self.said[0].split() if w.startswith("http"))

    def join(self):
        """The summary, when it is over."""
        self.thread.join(60)
        (summary,) = self.result
        return summary


def linger(monkeypatch):
    """The page lingers after its end until this event is set, so that a slow machine misses nothing."""
    seen = threading.Event()
    monkeypatch.setattr("oracles.web.play.time", SimpleNamespace(sleep=lambda _: seen.wait(60)))
    return seen


def weights(agent):
    return torch.cat([p.detach().flatten() for p in agent.model.parameters()])


def rounds_of(folder):
    return [
        tuple(Judgement(*answer) for answer in answers)
        for answers in json.loads((folder / "web" / "rounds.json").read_text())
    ]


def same_as_without_a_page(config, folder, ahead=1, scratch=None):
    """The model that was learned behind the page, which must be that of the same answers one after the other."""
    rounds = rounds_of(folder)
    course = make_course(config, folder / "web", ahead=ahead)
    assert course._path(rounds).exists(), "what the page's agent learned is kept"
    course.rebuild(rounds)
    alone = make_course(config, scratch or folder / "alone", ahead=ahead)
    before = weights(alone.agent)
    for answers in rounds:
        alone.play(answers)
    assert torch.equal(weights(course.agent), weights(alone.agent))
    assert not torch.equal(weights(course.agent), before), "it did learn"
    return weights(course.agent)
