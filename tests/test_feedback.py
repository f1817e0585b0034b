"""The feedback store: what was acknowledged stays, through kill -9; undo is a retraction; files are checked."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from prefenv.errors import FeedbackError
from prefenv.feedback import (
    FeedbackStore,
    Judgement,
    Panel,
    Retraction,
    Sample,
    mean_scores,
    model_hash,
    sample_id,
)


@pytest.fixture
def store(tmp_path):
    with FeedbackStore(tmp_path / "feedback.sqlite") as store:
        yield store


def question(store, panels=1, size=2, seed=0, **origin):
    """Panels of random samples as questions, and the samples."""
    x = torch.randn(panels, size, 3, 2, generator=torch.Generator().manual_seed(seed))
    return store.ask(x, **origin), x


# Names


def test_names_are_of_the_content():
    x = torch.randn(3, 2)
    assert sample_id(x) == sample_id(x.double().numpy()) == Sample(x.numpy()).id
    assert len({sample_id(x), sample_id(x.flatten()), sample_id(x + 1e-6)}) == 3
    assert Panel(("a", "b")).id == Panel(("b", "a")).id != Panel(("a", "b", "b")).id
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert model_hash(one) != model_hash(other)
    other.load_state_dict(one.state_dict())
    assert model_hash(one) == model_hash(other)


def test_records_refuse_what_makes_no_sense():
    with pytest.raises(FeedbackError, match="3 scores for 2 samples"):
        Judgement(("a", "b"), (1, 0, 0))
    with pytest.raises(FeedbackError, match="finite"):
        Judgement(("a",), (float("inf"),))
    with pytest.raises(FeedbackError, match="at least one"):
        Panel(())
    with pytest.raises(FeedbackError, match="finite"):
        Sample(np.array([np.nan]))
    with pytest.raises(FeedbackError, match="noise of a sample"):
        Sample(np.zeros((3, 2)), noise=np.zeros(6))
    with pytest.raises(FeedbackError, match="path of a sample"):
        Sample(np.zeros((3, 2)), path=np.zeros((3, 2)))
    assert Judgement(("a",), (float("nan"),)).scores == (None,)


# Questions and answers


def test_samples_come_back_bit_by_bit(store):
    x, path = torch.randn(2, 3, 4, 2), torch.randn(2, 3, 6, 4, 2)
    panels = store.ask(
        *(x, torch.ones_like(x), path, torch.zeros(2, 3, 5)),
        task="shapes",
        model="abc",
        condition="a roll",
        seed=7,
        info={"steps": 5},
    )
    assert [len(p.samples) for p in panels] == [3, 3] and store.panels() == panels
    found = store.sample(panels[1].samples[2])
    assert found.id == sample_id(x[1, 2])
    assert np.array_equal(found.x, x[1, 2]) and np.array_equal(found.path, path[1, 2])
    assert np.array_equal(found.noise, np.ones((4, 2))) and found.log_prob.shape == (5,)
    origin = (found.task, found.model, found.condition, found.seed, found.info)
    assert origin == ("shapes", "abc", "a roll", 7, {"steps": 5})
    assert [s.id for s in store.samples()] == [s for p in panels for s in p.samples]


def test_a_question_is_put_once(store):
    first, x = question(store, 3)
    again = store.ask(x)
    turned = store.ask(x.flip(1))
    assert again == first and [p.id for p in turned] == [p.id for p in first]
    assert len(store.panels()) == 3 and len(store.samples()) == 6


def test_answers_stand_in_the_order_shown(store):
    (panel,), x = question(store, size=3)
    a, b, c = panel.samples
    judgement = Judgement((c, a, b), (1, None, 0), "ann", 2.5)
    store.answer(judgement)
    assert store.judgements() == [judgement], "nothing is lost: order, time, annotator, seconds"
    scores, known = store.recall(x)
    torch.testing.assert_close(scores, torch.tensor([[torch.nan, 0, 1]]), equal_nan=True)
    assert known.tolist() == [True]
    flipped, _ = store.recall(x.flip(1))
    torch.testing.assert_close(flipped, torch.tensor([[1, 0, torch.nan]]), equal_nan=True)


def test_undo_is_a_retraction_seen_in_the_history(store):
    panels, x = question(store, 3)
    given = [Judgement(p.samples, (1, 0), "ann") for p in panels]
    other = Judgement(panels[0].samples, (0, 1), "bob")
    for judgement in (*given, other):
        store.answer(judgement)
    assert store.undo("ann") == given[2] and store.undo("ann") == given[1]
    assert store.judgements() == [given[0], other]
    assert store.waiting("ann") == panels[1:] and store.waiting("bob") == panels[1:]
    history = store.history()
    assert history[:4] == [*given, other], "what was retracted is still there"
    assert [(type(h), h.judgement, h.annotator) for h in history[4:]] == [
        (Retraction, given[2].id, "ann"),
        (Retraction, given[1].id, "ann"),
    ]
    again = Judgement(panels[1].samples, (0, 1), "ann")
    store.answer(again)
    assert store.undo("ann") == again and store.undo("ann") == given[0]
    assert store.undo("ann") is None and store.undo("nobody") is None
    assert store.recall(x)[1].tolist() == [True, False, False], "bob's answer stands"
    assert len(store.history()) == 9


def test_waiting_questions(store):
    panels, _ = question(store, 2)
    assert store.waiting("ann") == panels
    store.answer(Judgement(panels[0].samples, (None, None), "ann"))
    assert store.waiting("ann") == panels[1:], "a skip is an answer"
    assert store.waiting("bob") == panels


def test_recall_averages_annotators_and_takes_the_first_word_of_each(store):
    (panel, skipped, _), x = question(store, 3)
    a, b = panel.samples
    for scores, who in (((0, 1), "ann"), ((1, 0), "ann"), ((1, 1), "bob"), ((None, None), "eve")):
        store.answer(Judgement((a, b), scores, who))
    store.answer(Judgement(skipped.samples, (None, None), "ann"))
    scores, known = store.recall(x)
    expected = torch.tensor([[0.5, 1.0], [torch.nan] * 2, [torch.nan] * 2])
    torch.testing.assert_close(scores, expected, equal_nan=True)
    assert known.tolist() == [True, True, False], "a skip is known, silence is not"
    assert mean_scores(panel, []) == {a: None, b: None}


def test_an_answer_sent_twice_is_kept_once(store):
    (panel,), _ = question(store)
    judgement = Judgement(panel.samples, (1, 0), "ann")
    store.answer(judgement)
    store.answer(judgement)
    assert store.history() == [judgement]


def test_answers_about_unknown_samples_are_refused_whole(store):
    (panel,), _ = question(store)
    good = Judgement(panel.samples, (1, 0))
    with pytest.raises(FeedbackError, match="knows no sample 'nobody'"):
        store.record([good, Judgement(("nobody",), (1,))])
    with pytest.raises(FeedbackError, match="FOREIGN KEY"):
        store.record([good, Retraction("nothing")])
    with pytest.raises(FeedbackError, match="knows no sample"):
        store.put([], [Panel(("nobody",))])
    with pytest.raises(FeedbackError, match="knows no sample"):
        store.sample("nobody")
    assert store.history() == [] and store.panels() == [panel]
    store.record([good, Retraction(good.id)])
    with pytest.raises(FeedbackError, match="UNIQUE"):
        store.record([Retraction(good.id)])


# Files


def test_a_second_store_sees_every_answer_at_once(store):
    (panel,), _ = question(store)
    with FeedbackStore(store.path) as other, FeedbackStore(store.path, readonly=True) as reader:
        judgement = Judgement(panel.samples, (1, 0))
        other.answer(judgement)
        assert store.judgements() == reader.judgements() == [judgement]
        with pytest.raises(FeedbackError, match="readonly"):
            reader.undo()
    assert store._one("PRAGMA journal_mode")[0] == "wal"
    assert store._one("PRAGMA synchronous")[0] == 2


def test_threads_share_a_store(store):
    panels, _ = question(store, 40)

    def work(who):
        for panel in panels:
            store.answer(Judgement(panel.samples, (1, 0), who))

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(store.judgements(str(i))) for i in range(4)) == [40] * 4


def test_other_files_are_refused(tmp_path):
    text, foreign, newer = (tmp_path / n for n in ("text", "foreign.sqlite", "newer.sqlite"))
    text.write_text("not a database, but long enough to look at " * 50)
    with pytest.raises(FeedbackError, match="cannot open .*text"):
        FeedbackStore(text)
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE mine (a)")
    db.close()
    with pytest.raises(FeedbackError, match="another program's file"):
        FeedbackStore(foreign)
    FeedbackStore(newer).close()
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 2")
    db.close()
    with pytest.raises(FeedbackError, match="version 2, not feedback of version 1"):
        FeedbackStore(newer)
    with pytest.raises(FeedbackError, match="no feedback file at"):
        FeedbackStore(tmp_path / "missing.sqlite", readonly=True)
    with pytest.raises(FeedbackError, match="cannot open"):
        FeedbackStore(text / "below")


# Kill -9

# Forks two workers that answer and undo as fast as they can (one with two threads), and kills them at a random
# moment; fifty times. A worker says what was acknowledged only after the store has returned.
_LOAD = """
import os, random, signal, sys, threading, time
from prefenv.feedback import FeedbackStore, Judgement

path, seed = sys.argv[1], int(sys.argv[2])
rng = random.Random(seed)

def answers(store, panels, who):
    while True:
        n = rng.randrange(10**6)
        shown = rng.choice(panels).samples
        judgement = Judgement(shown, (n, n + 1, n + 2, n + 3), who, float(n))
        store.answer(judgement)
        os.write(1, f"answered {judgement.id} {n}\\n".encode())
        if n % 5 == 0 and (taken := store.undo(who)):
            os.write(1, f"undone {taken.id}\\n".encode())

def work(name):
    rng.seed(f"{seed} {name}")
    store = FeedbackStore(path)
    panels = store.panels()
    if name.startswith("server"):
        threading.Thread(target=answers, args=(store, panels, name + "b"), daemon=True).start()
    answers(store, panels, name)

for kill in range(50):
    children = []
    for name in (f"server{kill}", f"terminal{kill}"):
        if (child := os.fork()) == 0:
            work(name)
        children.append(child)
    time.sleep(rng.uniform(0.005, 0.15))
    for child in children:
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


def test_no_acknowledged_answer_is_lost_by_kill_9(tmp_path):
    path = tmp_path / "feedback.sqlite"
    with FeedbackStore(path) as store:
        question(store, panels=8, size=4)
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(path), str(random.Random(0).randrange(10**9))],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    answered = {line[1]: int(line[2]) for line in lines if line[0] == "answered"}
    undone = {line[1] for line in lines if line[0] == "undone"}
    assert len(answered) > 200 and len(undone) > 20, "there was load"
    with FeedbackStore(path) as store:
        assert store._one("PRAGMA integrity_check")[0] == "ok"
        history = store.history()
        kept = {j.id: j for j in history if isinstance(j, Judgement)}
        standing = {j.id for j in store.judgements()}
        known = {p.id for p in store.panels()}
    assert answered.keys() <= kept.keys(), "an acknowledged answer is lost"
    assert not undone & standing, "an acknowledged undo is lost"
    for j in kept.values():
        n = int(j.seconds)
        assert j.scores == (n, n + 1, n + 2, n + 3) and j.panel in known, "half an answer"
        assert answered.get(j.id, n) == n
    retracted = {r.judgement for r in history if isinstance(r, Retraction)}
    assert standing == kept.keys() - retracted
    # What was kept but not acknowledged was under way: at most one for each of the three writers and each kill.
    assert len(kept) - len(answered) <= 150 and len(retracted) - len(undone) <= 150
