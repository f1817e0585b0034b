"""Who is asked what: assignment, overlap, undo, hidden repeats, restarts."""

from __future__ import annotations

import threading

import pytest
from people import samples

from oracles.web.questions import DISTANCE, Questions, Refused, scores_of
from prefenv.feedback import FeedbackStore, Judgement, Retraction


@pytest.fixture
def store(tmp_path):
    with FeedbackStore(tmp_path / "feedback.sqlite") as store:
        yield store


def opened(store, m=3, k=2, **settings):
    """Questions about m panels, and the panels."""
    panels = store.ask(samples(m, k))
    questions = Questions(store, "key", **settings)
    questions.put(panels)
    return questions, panels


def test_answers_as_scores():
    assert scores_of([1], 3) == (0, 1, 0) and scores_of([], 2) == (0, 0)
    assert scores_of("tie", 2) == (0.5, 0.5) and scores_of("skip", 2) == (None, None)
    for wrong in ("none", None, 1, {"a": 1}, [2], [-1], [True], [0.0], ["0"], [0, 0], [[0]]):
        with pytest.raises(Refused, match="answer is|places"):
            scores_of(wrong, 2)


def test_each_question_goes_to_one_annotator_and_stays_theirs(store):
    questions, panels = opened(store)
    ann, bob = questions.next("ann"), questions.next("bob")
    assert (ann.panel, bob.panel) == (panels[0].id, panels[1].id)
    assert questions.next("ann") == ann, "a reload shows the same, in the same order"
    assert questions.answer("ann", ann.id, [0], 2.5)
    assert questions.next("ann").panel == panels[2].id and questions.next("eve") is None
    (kept,) = store.judgements()
    assert (kept.samples, kept.scores, kept.annotator) == (ann.samples, (1, 0), "ann")
    assert (kept.seconds, kept.id) == (2.5, ann.id)


def test_who_leaves_gives_the_question_up_at_once(store):
    questions, panels = opened(store, 1)
    late = questions.next("ann")
    assert questions.next("bob") is None
    questions.leave("ann")
    questions.leave("nobody")
    taken = questions.next("bob")
    assert taken.panel == panels[0].id and questions.next("ann") is None
    questions.answer("bob", taken.id, [1])
    with pytest.raises(Refused, match="somebody else"):
        questions.answer("ann", late.id, [0])


def test_who_went_away_gives_the_question_up(store):
    now = 0.0
    questions, panels = opened(store, 1, patience=60, clock=lambda: now)
    late = questions.next("ann")
    assert questions.next("bob") is None
    now = 61.0
    taken = questions.next("bob")
    assert taken.panel == panels[0].id and taken.id != late.id
    questions.answer("bob", taken.id, [1])
    with pytest.raises(Refused, match="somebody else") as refusal:
        questions.answer("ann", late.id, [0])
    assert refusal.value.status == 409 and len(store.history()) == 1


def test_overlap_asks_so_many_annotators(store):
    questions, (panel,) = opened(store, 1, overlap=2)
    ann, bob = questions.next("ann"), questions.next("bob")
    assert ann.panel == bob.panel == panel.id and questions.next("eve") is None
    questions.answer("ann", ann.id, "skip")
    assert questions.next("ann") is None and not questions.complete(panel.id)
    questions.answer("bob", bob.id, "tie")
    assert questions.complete(panel.id) and not questions.open


def test_the_order_is_shuffled_and_recorded(store):
    questions, panels = opened(store, 30, 4)
    places = []
    for panel in panels:
        question = questions.next("ann")
        assert sorted(question.samples) == sorted(panel.samples)
        places.append(question.samples.index(panel.samples[0]))
        questions.answer("ann", question.id, [0])
        assert store.judgements()[-1].samples == question.samples
    assert all(places.count(i) >= 3 for i in range(4)), "every place comes up"


def test_undo_without_limit_is_seen_in_the_history(store):
    questions, panels = opened(store, 3)
    for _ in panels:
        questions.answer("ann", questions.next("ann").id, [0])
    assert not questions.open and questions.wait(panels)
    for panel in reversed(panels):
        questions.undo("ann")
        assert questions.next("ann").panel == panel.id
        assert questions.next("bob") is None or questions.next("bob").panel != panel.id
    assert questions.undo("ann") is None and questions.stale, "the agent had had these answers"
    for panel in panels:
        question = questions.next("ann")
        assert question.panel == panel.id, "the first one first"
        questions.answer("ann", question.id, [1])
    kinds = [type(e) for e in store.history()]
    assert kinds == [Judgement] * 3 + [Retraction] * 3 + [Judgement] * 3
    assert [j.scores for j in store.judgements()] == [(0, 1)] * 3


def test_an_answer_counts_once_however_often_it_is_sent(store):
    questions, _ = opened(store, 2)
    question = questions.next("ann")
    assert questions.answer("ann", question.id, [0])
    assert not questions.answer("ann", question.id, [1]), "the first one stands"
    assert [j.scores for j in store.history()] == [(1, 0)]
    questions.undo("ann")
    with pytest.raises(Refused, match="taken back"):
        questions.answer("ann", question.id, [0])
    anew = questions.next("ann")
    assert anew.panel == question.panel and anew.id != question.id


def test_answers_to_what_was_never_asked_or_asked_of_another(store):
    questions, panels = opened(store, 2)
    ann, bob = questions.next("ann"), questions.next("bob")
    for who, name in (("bob", ann.id), ("ann", bob.id), ("ann", panels[0].id), ("ann", "0" * 64)):
        with pytest.raises(Refused, match="no such question") as refusal:
            questions.answer(who, name, [0])
        assert refusal.value.status == 404
    questions.answer("ann", ann.id, [0])
    with pytest.raises(Refused, match="no such question"):
        questions.answer("bob", ann.id, [0])
    assert len(store.history()) == 1


def test_hidden_repeats_come_late_once_and_do_not_count(store):
    m = 60
    panels = store.ask(x := samples(m))
    questions = Questions(store, "key", repeats=0.25)
    questions.put(panels)
    seen, repeated = [], []
    while (question := questions.next("ann")) is not None:
        assert questions.next("ann") == question, "a reload does not draw anew"
        if question.panel in seen:
            repeated.append(len(seen) - seen.index(question.panel))
        # Always the same sample, but for repeats: those are answered the other way round.
        chosen = questions.panels[question.panel].samples[question.panel in seen]
        questions.answer("ann", question.id, [question.samples.index(chosen)])
        seen.append(question.panel)
    assert set(seen) == {p.id for p in panels} and len(seen) == m + len(repeated)
    assert 8 <= len(repeated) <= 35 and min(repeated) > DISTANCE
    assert max(seen.count(p) for p in seen) == 2
    scores, known = store.recall(x)
    assert scores.tolist() == [[1, 0]] * m and known.all(), "only the first answer counts"
    last = seen[-1]
    questions.undo("ann")
    assert questions.next("ann").panel == last


def test_a_restart_goes_on_where_it_was(store):
    questions, panels = opened(store, 3, repeats=0.2)
    questions.answer("ann", questions.next("ann").id, [0])
    under_way = questions.next("ann")
    with FeedbackStore(store.path) as again:
        later = Questions(again, "key", repeats=0.2)
        # The agent, slower than the page, has not yet put its questions again.
        assert later.answer("ann", under_way.id, [1]), "sent before, answered after the restart"
        later.put(panels)
        assert not later.answer("ann", store.judgements()[0].id, [1]), "kept before the restart"
        assert len(later.open) == 1 and len(again.judgements()) == 2
        foreign = Questions(again, "another key")
        foreign.put(panels)
        with pytest.raises(Refused):
            foreign.answer("ann", questions._question("ann", panels[2].id).id, [0])


def test_waiting_ends_with_the_last_answer_or_when_closed(store):
    questions, panels = opened(store, 2)
    assert not questions.wait(panels, lambda: True)
    done = threading.Event()
    thread = threading.Thread(target=lambda: questions.wait(panels) and done.set())
    thread.start()
    questions.answer("ann", questions.next("ann").id, "skip")
    assert not done.wait(0.1)
    questions.answer("ann", questions.next("ann").id, [])
    thread.join(60)
    assert done.is_set() and not questions.stale
