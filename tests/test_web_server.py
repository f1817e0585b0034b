"""The annotation page's server: what it refuses, and that nothing acknowledged is lost."""

from __future__ import annotations

import json
import socket
import stat
import sys
import threading

import pytest
import torch
from people import TASK, Person, oracle, samples

from oracles.web import Closed, WebOracle
from oracles.web.security import BODY, Bucket, Guard, secret
from prefenv.errors import ConfigError
from prefenv.feedback import FeedbackStore, sample_id
from prefenv.registry import make_oracle

pytest.importorskip("uvicorn")


@pytest.fixture
def web(tmp_path):
    """A served page with three questions open, and its oracle."""
    web = oracle(tmp_path)
    session = web.session
    session.questions.put(session.store.ask(samples(3)))
    yield web
    web.close()


@pytest.fixture
def ann(web):
    person = Person(web.start())
    yield person
    person.close()


def judging(web, panels):
    """``judge`` in a thread, and where its result or error comes."""
    result = []

    def run():
        try:
            result.append(web.judge(panels))
        except Closed as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, result


# The oracle


def test_people_judge_and_the_oracle_gets_their_scores(tmp_path):
    web, panels = oracle(tmp_path), samples(4, 3)
    ann = Person(web.start())
    thread, result = judging(web, panels)
    for answer in ([0], "skip", "tie", []):
        question = ann.wait()
        assert torch.tensor(question["samples"]).shape == (3, 64, 2) and question["extent"] > 1
        ann.answer(question, answer)
    thread.join(60)
    (scores,) = result
    shown = web.session.store.judgements()[0].samples[0]
    expected = torch.zeros(4, 3)
    expected[0] = torch.tensor([float(sample_id(x) == shown) for x in panels[0]])
    expected[1], expected[2] = torch.nan, 0.5
    assert expected[0].sum() == 1
    torch.testing.assert_close(scores, expected, equal_nan=True)
    torch.testing.assert_close(web.judge(panels), expected, equal_nan=True)  # not asked again
    ann.close()
    web.close()


def test_closing_ends_the_waiting_and_keeps_the_answers(web, ann):
    thread, result = judging(web, samples(3))
    ann.answer(ann.wait(), [0])
    ann.close()
    path = web.path
    web.close()
    thread.join(60)
    assert isinstance(result[0], Closed)
    with FeedbackStore(path) as store:
        assert len(store.judgements()) == 1


def test_a_run_keeps_what_it_learned_from_an_answer_that_is_taken_back(tmp_path):
    web = oracle(tmp_path)
    ann, panels = Person(web.start()), samples(2)
    thread, _ = judging(web, panels[:1])
    question = ann.wait()
    ann.answer(question, [0])
    thread.join(60)
    again = ann.post("undo")
    assert again["undone"] and sorted(again["question"]["samples"]) == sorted(question["samples"])
    thread, result = judging(web, panels[1:])
    ann.answer(ann.next(), [1])
    ann.answer(ann.wait(), [1])
    thread.join(60)
    assert result[0].sum() == 1
    ann.close()
    web.close()


def test_settings():
    web = make_oracle("web:port=0,overlap=2,repeats=0.1", TASK)
    assert isinstance(web, WebOracle) and web._session is None, (
        "nothing is served before it is asked"
    )
    for text, told in {
        "overlap=0": "overlap",
        "repeats=1": "repeats",
        "port=70000": "port",
        "host=0.0.0.0": "expose=True",
    }.items():
        with pytest.raises(ConfigError, match=told):
            make_oracle(f"web:{text}", TASK)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    for name in ("oracles.web.session", "oracles.web.server"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"needs uvicorn.*pip install 'prefenv\[web\]'"):
        oracle(tmp_path).start()


def test_a_port_that_is_taken(web, tmp_path):
    port = web.session.server.port
    with pytest.raises(ConfigError, match="cannot serve.*port=0"):
        oracle(tmp_path / "other", port=port).start()


def test_another_interface_warns(tmp_path):
    web = oracle(tmp_path, host="0.0.0.0", expose=True)
    with pytest.warns(UserWarning, match="whoever reaches 0.0.0.0"):
        link = web.start()
    ann = Person(link.replace("0.0.0.0", "127.0.0.1"))
    assert ann.next() is None
    assert ann.refused("next", annotator="") == 400
    assert ann.request("GET", "/", Host=f"evil.example:{ann.port}")[0] == 421
    ann.close()
    web.close()


# Security


def test_the_page_is_three_fixed_files(ann):
    for path, kind in {"/": "text/html", "/page.js": "javascript", "/page.css": "text/css"}.items():
        status, text = ann.request("GET", path, X_Token=None)
        assert status == 200 and kind in ann.headers["content-type"] and text
        policy = ann.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';") and "unsafe" not in policy
        assert ann.headers["x-content-type-options"] == "nosniff" and "server" not in ann.headers
        assert (
            "http:" not in text.replace("http://www.w3.org/2000/svg", "") and "https:" not in text
        )
    page = ann.request("GET", "/")[1]
    assert "onclick" not in page and ann.request("GET", "/?f=../server.py")[1] == page


@pytest.mark.parametrize(
    "path",
    ["/../server.py", "/page/../../server.py", "/%2e%2e/server.py", "/..%2fserver.py", "//etc/passwd",
     "/page.js/../../server.py", "/page.js%00", "/..\\server.py", "/index.html", "/feedback.sqlite",
     "/feedback.token", "/page/", "/api", "/docs", "/api/../page.css", "http://evil.example/etc/passwd"],
)  # fmt: skip
def test_nothing_else_is_served(ann, path):
    status, text = ann.request("GET", path)
    assert status in (404, 405) and len(text) < 100


def test_wrong_tokens(ann):
    for token in (None, "", "x", ann.token[:-1], ann.token + "x", ann.token.swapcase()):
        for call in ("next", "leave", "answer", "undo", "state", "nothing"):
            status, text = ann.request("POST", f"/api/{call}", b"{}", X_Token=token)
            assert status == 401 and ann.token not in text
    assert ann.next() is not None


def test_foreign_hosts_and_origins(ann):
    own = f"127.0.0.1:{ann.port}"
    for host in ("evil.example", f"evil.example:{ann.port}", "127.0.0.1", "127.0.0.1:1", "", None,
                 f"127.0.0.1.evil.example:{ann.port}", f"192.168.0.1:{ann.port}"):  # fmt: skip
        assert ann.request("GET", "/", Host=host)[0] in (400, 421), host
    for origin in (
        "http://evil.example",
        "null",
        f"https://{own}",
        "http://127.0.0.1",
        f"http://localhost:{ann.port}",
    ):
        assert ann.request("POST", "/api/next", b"{}", Origin=origin)[0] == 403, origin
    body = json.dumps({"annotator": "ann"}).encode()
    assert ann.request("POST", "/api/next", body, Origin=f"http://{own}")[0] == 200
    local = f"localhost:{ann.port}"
    assert ann.request("POST", "/api/next", body, Host=local, Origin=f"http://{local}")[0] == 200


def test_two_headers_of_one_name():
    guard = Guard(None, "token")
    scope = {"headers": [(b"host", b"a"), (b"host", b"b")], "client": ("a", 1), "server": ("a", 1)}
    assert guard.verdict({**scope, "path": "/"})[0] == 400


def test_long_bodies(ann):
    big = json.dumps({"annotator": "ann", "more": "x" * BODY}).encode()
    assert ann.request("POST", "/api/next", big)[0] == 413
    ann.close()
    for said in (str(BODY + 1), "99999999999999999999999", "-1", "x"):
        with socket.create_connection((ann.host, ann.port), timeout=60) as wire:
            head = (
                f"POST /api/next HTTP/1.1\r\nHost: 127.0.0.1:{ann.port}\r\nX-Token: {ann.token}\r\n"
            )
            wire.sendall(f"{head}Content-Length: {said}\r\n\r\n".encode())
            assert wire.recv(4096).split()[1] in (b"413", b"400")
    with socket.create_connection((ann.host, ann.port), timeout=60) as wire:  # no length said
        wire.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        part = b"1000\r\n" + b"[" * 4096 + b"\r\n"
        wire.sendall(part * 5 + b"0\r\n\r\n")
        assert wire.recv(4096).split()[1] == b"413"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"ann"', b"[" * 16000, b"\xff\xfe", b"{'annotator': 1}", b'{"annotator": 1e9999}',
     b'{"annotator": ""}', b'{"annotator": "  "}', b'{"annotator": "a\\nb"}', b'{"annotator": "\\ud800"}',
     json.dumps({"annotator": "a" * 41}).encode(), b'{"annotator": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_malformed_bodies(ann, body):
    for call in ("next", "leave", "answer", "undo", "state"):
        status, text = ann.request("POST", f"/api/{call}", body)
        assert status == 400 and "Traceback" not in text
    assert ann.next() is not None, "it lives on"


def test_malformed_answers(web, ann):
    question = ann.next()
    good = {"question": question["id"], "answer": [0], "seconds": 1.0}
    wrongs = {
        "question": (None, ["x"], "\ud800", "x" * 65),
        "answer": ("best", None, {}, [2], [0, 0], [True], [0.5]),
        "seconds": (-1, "1", True, float("nan"), float("inf")),
    }
    for wrong in ({name: value} for name, values in wrongs.items() for value in values):
        assert ann.refused("answer", **{**good, **wrong}) == 400, wrong
    assert ann.refused("answer", answer=[0]) == 400
    assert web.session.store.history() == []
    assert ann.post("answer", **{**good, "seconds": None})["kept"]


def test_answers_that_are_not_theirs_or_come_again(web, ann):
    bob = Person(web.start(), "bob")
    mine, his = ann.next(), bob.next()
    assert mine["id"] != his["id"]
    assert ann.refused("answer", question=his["id"], answer=[0]) == 404
    assert ann.refused("answer", question="0" * 64, answer=[0]) == 404
    assert ann.answer(mine, [0])["kept"] is True
    assert ann.answer(mine, [1])["kept"] is False
    assert bob.refused("answer", question=mine["id"], answer=[0]) == 404
    ann.post("undo")
    assert ann.refused("answer", question=mine["id"], answer=[0]) == 409
    assert len(web.session.store.history()) == 2
    bob.close()


def test_too_fast(web, ann):
    web.session.api.bucket = Bucket(0, 3)
    assert [ann.refused("state") for _ in range(5)] == [200] * 3 + [429] * 2
    assert ann.refused("state", annotator="bob") == 200
    now = 0.0
    bucket = Bucket(2, 3, lambda: now)
    assert [bucket.take("a") for _ in range(4)] == [True] * 3 + [False] and bucket.take("b")
    now = 0.5
    assert [bucket.take("a") for _ in range(2)] == [True, False]
    for i in range(3000):
        bucket.take(str(i))
    assert len(bucket.levels) <= 1024


def test_every_address_has_a_rate():
    guard = Guard(None, "token", bucket=Bucket(0, 2))
    scope = {"headers": [(b"host", b"localhost:1")], "server": ("a", 1), "path": "/"}
    told = [guard.verdict({**scope, "client": ("a", i)})[0] for i in range(3)]
    assert told == [200, 200, 429] and guard.verdict({**scope, "client": ("b", 1)})[0] == 200


def test_names_are_bounded(web, ann):
    web.session.api.names = {f"n{i}" for i in range(254)}
    codes = [ann.refused("next", annotator=name) for name in ("x", "y", "z", "n0", "x")]
    assert codes == [200, 200, 403, 200, 200]


def test_the_token_is_private_and_stays(tmp_path):
    path = tmp_path / "run" / "feedback.token"
    token = secret(path)
    assert len(token) >= 43 and secret(path) == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(list(path.parent.iterdir())) == 1
    assert secret(tmp_path / "other.token") != token
    path.write_text("short")
    with pytest.raises(ConfigError, match="holds no token"):
        secret(path)


# Load


def test_twenty_annotators_answer_a_thousand_questions_once_each(tmp_path):
    web = oracle(tmp_path)
    panels = web.session.store.ask(samples(1000, 2))
    web.session.questions.put(panels)
    acknowledged: dict[str, list[str]] = {}

    def work(name):
        person, mine = Person(web.start(), name), acknowledged.setdefault(name, [])
        question = person.next()
        while question is not None:
            mine.append(question["id"])
            following = person.answer(question, [len(mine) % 2])
            if len(mine) % 10 == 0:
                assert person.answer(question, [0])["kept"] is False, "sent again"
            question = following["question"]
        person.close()

    threads = [threading.Thread(target=work, args=(f"person {i}",)) for i in range(20)]
    for thread in threads:
        thread.start()
    assert web.session.questions.wait(panels)
    for thread in threads:
        thread.join(60)
    history = web.session.store.history()
    assert len(history) == 1000 == sum(map(len, acknowledged.values()))
    assert {j.panel for j in history} == {p.id for p in panels}
    for name, ids in acknowledged.items():
        mine = [j for j in history if j.annotator == name]
        assert [j.id for j in mine] == ids and len(mine) > 10
        assert [j.scores[0] for j in mine] == [float((i + 1) % 2 == 0) for i in range(len(mine))]
    web.close()
