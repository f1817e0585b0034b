"""The server is killed under load, again and again: no acknowledged answer is lost, none is kept by half."""

from __future__ import annotations

import http.client
import random
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from people import HELD, Held, Person, same_as_without_a_page, samples

from oracles.web.security import secret
from prefenv.feedback import FeedbackStore, Judgement, Retraction
from prefenv.play import PlayConfig

pytest.importorskip("uvicorn")

# Serves in a fork, so that a start is quick; "kill" kills it with SIGKILL in the middle of whatever it does.
_SERVE = """
import os, signal, sys
from people import oracle
from pathlib import Path
import oracles.web.session

folder, port = Path(sys.argv[1]), int(sys.argv[2])
for line in sys.stdin:
    if line == "start\\n" and (child := os.fork()) == 0:
        web = oracle(folder, port=port, repeats=0.1)
        panels = web.session.store.panels()
        web.session.questions.put(panels)
        web.session.questions.wait(panels)
        signal.pause()
    if line == "kill\\n":
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        print("killed", flush=True)
"""


# Plays in a fork, and "hold" never ends its learning.
_PLAY = """
import os, signal, sys
from people import Held, play
from prefenv.play import PlayConfig
from pathlib import Path

folder, port, agent = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
config = PlayConfig(agent=agent, panel_size=2, seed=100, steps=4, device="cpu")
for line in sys.stdin:
    if line in ("hold\\n", "free\\n") and (child := os.fork()) == 0:
        if line == "free\\n":
            Held.may.set()
        play(config, folder, sys.stderr, port=port, rounds=3)
        os._exit(0)
    if line == "kill\\n":
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        print("killed", flush=True)
    if line == "wait\\n":
        print(os.waitpid(child, 0)[1], flush=True)
"""


class Client(threading.Thread):
    """An annotator who answers as fast as possible, and sends again what was not acknowledged."""

    def __init__(self, link, name):
        super().__init__(daemon=True)
        self.person, self.rng, self.stop = Person(link, name), random.Random(name), False
        self.kept: dict[str, list[int]] = {}  # acknowledged answers
        self.undone = 0
        self.error: BaseException | None = None

    def again(self, call, **body):
        while not self.stop:
            try:
                return self.person.post(call, **body)
            except AssertionError as error:
                if error.args[0][0] != 409:  # after a restart somebody else may have been quicker
                    raise
                return None
            except (OSError, http.client.HTTPException):
                self.person.close()
                time.sleep(0.01)
        return None

    def run(self):
        try:
            while not self.stop:
                question = (self.again("next") or {}).get("question")
                while question is not None and not self.stop:
                    answer = [self.rng.randrange(2)]
                    reply = self.again("answer", question=question["id"], answer=answer)
                    if reply is None:
                        break
                    self.kept[question["id"]] = answer
                    question = reply["question"]
                    if self.rng.random() < 0.1:
                        with suppress(OSError, http.client.HTTPException):
                            self.undone += self.person.post("undo")["undone"]
                        self.person.close()
                        break
        except BaseException as error:
            self.error = error
        finally:
            self.person.close()


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_9_under_load(kills, tmp_path):
    m, rng = 120 * kills, random.Random(kills)
    with FeedbackStore(tmp_path / "feedback.sqlite") as store:
        store.ask(samples(m))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    link = f"http://127.0.0.1:{port}/#{secret(tmp_path / 'feedback.token')}"
    command = [sys.executable, "-c", _SERVE, str(tmp_path), str(port)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent,
    ) as server:  # fmt: skip
        clients = [Client(link, f"person {i}") for i in range(4)]
        for client in clients:
            client.start()
        for _ in range(kills):
            before = sum(len(c.kept) for c in clients)
            print("start", file=server.stdin, flush=True)
            end = time.monotonic() + 60
            while sum(len(c.kept) for c in clients) == before:
                assert time.monotonic() < end, [c.error for c in clients]
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.3))
            print("kill", file=server.stdin, flush=True)
            assert server.stdout.readline() == "killed\n"
        for client in clients:
            client.stop = True
        for client in clients:
            client.join(60)
            assert client.error is None
        server.stdin.close()
    with FeedbackStore(tmp_path / "feedback.sqlite") as store:
        assert store._one("PRAGMA integrity_check")[0] == "ok"
        history, standing, panels = store.history(), store.judgements(), store.panels()
    kept = {j.id: j for j in history if isinstance(j, Judgement)}
    acknowledged = {name: answer for c in clients for name, answer in c.kept.items()}
    assert len(acknowledged) > 3 * kills, "there was load"
    assert acknowledged.keys() <= kept.keys(), "an acknowledged answer is lost"
    for name, answer in acknowledged.items():
        assert [i for i, s in enumerate(kept[name].scores) if s] == answer
    known = {p.id: set(p.samples) for p in panels}
    assert all(set(j.samples) == known[j.panel] and sum(j.scores) == 1 for j in kept.values())
    undone = sum(isinstance(e, Retraction) for e in history)
    assert sum(c.undone for c in clients) <= undone == len(kept) - len(standing)
    # Under way when the server was killed: at most one answer or undo of each annotator and kill.
    assert len(kept) - len(acknowledged) <= 4 * kills
    first = {}
    for judgement in standing:
        assert first.setdefault(judgement.panel, judgement.annotator) == judgement.annotator, (
            "asked of two"
        )


@pytest.mark.slow
@pytest.mark.parametrize("agent", HELD)
def test_kill_9_while_the_agent_learns(agent, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    link = f"http://127.0.0.1:{port}/#{secret(tmp_path / 'feedback.token')}"
    command = [sys.executable, "-c", _PLAY, str(tmp_path), str(port), agent]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        cwd=Path(__file__).parent,
    ) as server:  # fmt: skip
        ann, acknowledged = Person(link), []

        def ask(call, true, **body):
            """What the page says, as soon as it is there and that is true."""
            end = time.monotonic() + 60
            while time.monotonic() < end:
                with suppress(OSError, http.client.HTTPException):
                    if true(told := ann.post(call, **body)):
                        return told
                ann.close()
                time.sleep(0.05)
            raise AssertionError(f"never: {call}")

        def tell(line):
            print(line, file=server.stdin, flush=True)

        def answer():
            question = ask("next", lambda told: told["question"])["question"]
            assert ann.answer(question, [len(acknowledged) % 2])["kept"]
            acknowledged.append(question["id"])

        def learning(told):
            return told["phase"] == "learning"

        tell("hold")
        answer()
        assert ask("state", learning)["rounds"] == 0
        answer()  # while it learns
        for _ in range(2):
            tell("kill")
            assert server.stdout.readline() == "killed\n"
            ann.close()
            tell("hold")
            state = ask("state", learning)
            assert (state["mine"], state["rounds"], state["open"]) == (2, 0, 0), "nothing is lost"
        tell("kill")
        assert server.stdout.readline() == "killed\n"
        ann.close()
        tell("free")
        answer()
        ann.close()
        tell("wait")
        assert server.stdout.readline() == "0\n"
        server.stdin.close()
    with FeedbackStore(tmp_path / "feedback.sqlite") as store:
        assert [j.id for j in store.judgements()] == acknowledged
    Held.may.set()
    config = PlayConfig(agent=agent, panel_size=2, seed=100, steps=4, device="cpu")
    same_as_without_a_page(config, tmp_path)
