"""The agent learns in the background: people answer meanwhile, take answers back, and it ends where they lead."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from people import HELD, Held, Person, Playing, linger, rounds_of, same_as_without_a_page

from prefenv.errors import ConfigError
from prefenv.feedback import FeedbackStore, Panel, model_hash, sample_id
from prefenv.play import PlayConfig
from prefenv.play.ahead import make_course

pytest.importorskip("uvicorn")
CONFIG = PlayConfig(panel_size=2, seed=100, steps=4, device="cpu")


@pytest.fixture(autouse=True)
def held(monkeypatch):
    """No agent learns before it may."""
    monkeypatch.setattr("oracles.web.play.LINGER", 0.3)
    Held.hold()
    yield
    Held.may.set()


def began():
    """Wait until the agent has begun to learn from the next round."""
    assert Held.began.wait(60)
    Held.began.clear()


@pytest.mark.parametrize("agent", HELD)
def test_a_question_is_open_before_the_learning_of_the_last_round_has_ended(agent, tmp_path):
    config = replace(CONFIG, agent=agent)
    playing = Playing(config, tmp_path, rounds=3)
    ann = Person(playing.link)
    first = ann.wait(60)
    assert ann.answer(first, [0])["question"] is not None, "at once, with the acknowledgement"
    began()
    second, state = ann.next(), ann.post("state")
    assert second["id"] != first["id"] and (state["phase"], state["rounds"]) == ("learning", 0)
    assert state["pictures"]["rates"]["B"] == state["pictures"]["rates"]["A"]
    reply = ann.answer(second, [1])
    assert reply["kept"] and reply["question"] is None, "so far ahead and no further"
    assert ann.post("undo")["question"]["samples"] != first["samples"]
    ann.answer(ann.next(), [1])
    assert not Held.may.is_set() and ann.post("state")["rounds"] == 0, "it has not ended yet"
    Held.may.set()
    third = ann.wait(60)
    ann.answer(third, [0])
    summary = playing.join()
    ann.close()
    assert (summary["answers"], summary["rounds"], summary["undone"]) == (3, 3, 1)
    same_as_without_a_page(config, tmp_path)
    with FeedbackStore(tmp_path / "feedback.sqlite") as store:
        course = make_course(config, tmp_path / "web", ahead=1)
        origin = [store.sample(j.samples[0]) for j in store.judgements()]
        assert [s.info["learned"] for s in origin] == [0, 0, 1], "one round stale, and it is told"
        assert [s.info["round"] for s in origin] == [0, 1, 2]
        assert {s.model for s in origin} == {model_hash(course.agent.reference)}
        made = course.agent.env.reference.sample(torch.tensor(origin[2].noise)[None])
        torch.testing.assert_close(made[0], torch.tensor(origin[2].x))


@pytest.mark.parametrize("agent,meanwhile", list(zip(HELD, (1, 0), strict=True)))
def test_an_answer_that_is_being_learned_from_is_taken_back(agent, meanwhile, tmp_path):
    config = replace(CONFIG, agent=agent)
    playing = Playing(config, tmp_path / "web", rounds=2)
    ann = Person(playing.link)
    first = ann.wait(60)
    ann.answer(first, [0])
    began()
    if meanwhile:
        ann.answer(ann.next(), [0])
        ann.post("undo")
    again = ann.post("undo")["question"]
    assert sorted(again["samples"]) == sorted(first["samples"]) and again["id"] != first["id"]
    place = again["samples"].index(first["samples"][1])
    ann.answer(again, [place])  # the other one
    Held.may.set()
    ann.answer(ann.wait(60), [0])
    summary = playing.join()
    ann.close()
    assert (summary["answers"], summary["undone"]) == (2, 1 + meanwhile)
    learned = rounds_of(tmp_path / "web")
    with FeedbackStore(tmp_path / "web" / "feedback.sqlite") as store:
        for (kept,) in learned:
            by = dict(zip(kept.samples, kept.scores, strict=True))
            assert store.scores(Panel(kept.samples)) == by, "it learned from what stands"
    chosen = learned[0][0].samples[learned[0][0].scores.index(1.0)]
    assert chosen == sample_id(store_value(first["samples"][1], tmp_path, chosen))
    same_as_without_a_page(config, tmp_path / "web")


def store_value(points, folder, name):
    """The exact sample behind points that were rounded for the wire."""
    with FeedbackStore(folder / "web" / "feedback.sqlite") as store:
        x = store.sample(name).x
    torch.testing.assert_close(torch.tensor(points), torch.tensor(x), atol=1e-3, rtol=0)
    return x


def test_one_that_must_learn_first_says_so(tmp_path):
    config = replace(CONFIG, agent="people:HeldAWM")
    playing = Playing(config, tmp_path, rounds=2)
    ann = Person(playing.link)
    first = ann.wait(60)
    assert ann.answer(first, [0])["question"] is None
    began()
    assert ann.post("state")["phase"] == "learning" and ann.next() is None
    again = ann.post("undo")["question"]
    assert sorted(again["samples"]) == sorted(first["samples"]), "undo works meanwhile"
    ann.answer(again, [1])
    Held.may.set()
    ann.answer(ann.wait(60), [1])
    playing.join()
    ann.close()
    same_as_without_a_page(config, tmp_path, ahead=0)
    with FeedbackStore(tmp_path / "feedback.sqlite") as store:
        models = [store.sample(j.samples[0]).model for j in store.judgements()]
        assert models[1] != models[0] == model_hash(make_course(config, tmp_path).agent.reference)
    with pytest.raises(ConfigError, match="must learn before it asks on"):
        make_course(config, tmp_path / "b", ahead=1)
    with pytest.raises(ConfigError, match="whole number"):
        make_course(config, tmp_path / "b", ahead=-1)


def test_a_third_round_waits_where_two_are_asked_ahead(tmp_path):
    playing = Playing(replace(CONFIG, agent=HELD[1]), tmp_path, rounds=4, ahead=2)
    ann = Person(playing.link)
    question = ann.wait(60)
    for _ in range(3):
        question = ann.answer(question, [0])["question"]
    assert question is None
    Held.may.set()
    ann.answer(ann.wait(60), [0])
    assert playing.join()["rounds"] == 4
    ann.close()
    same_as_without_a_page(replace(CONFIG, agent=HELD[1]), tmp_path, ahead=2)


def test_an_answer_that_was_learned_from_before_a_restart_is_unlearned(tmp_path):
    Held.may.set()
    config = replace(CONFIG, agent=HELD[0])
    playing = Playing(config, tmp_path, rounds=1)
    ann = Person(playing.link)
    ann.answer(ann.wait(60), [0])
    playing.join()
    ann.close()
    playing = Playing(config, tmp_path, rounds=2)
    ann = Person(playing.link)
    ann.wait(60)
    question = ann.post("undo")["question"]
    while question is not None:
        question = ann.answer(question, "tie")["question"]
    playing.join()
    ann.close()
    assert [j.scores for (j,) in rounds_of(tmp_path)] == [(0.5, 0.5)] * 2


def test_the_last_answer_can_be_taken_back_when_all_is_done(tmp_path, monkeypatch):
    over = linger(monkeypatch)
    Held.may.set()
    playing = Playing(replace(CONFIG, agent=HELD[0]), tmp_path, rounds=1)
    ann = Person(playing.link)
    ann.answer(ann.wait(60), [0])
    while ann.post("state")["phase"] != "done":
        time.sleep(0.01)
    ann.answer(ann.post("undo")["question"], "tie")
    over.set()
    playing.join()
    ann.close()
    assert [j.scores for (j,) in rounds_of(tmp_path)] == [(0.5, 0.5)]
