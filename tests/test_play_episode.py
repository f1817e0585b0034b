"""The episode: the toy's promises, nothing lost, and the same answers lead to the same bits."""

from __future__ import annotations

import json

import pytest
import torch

from prefenv.errors import ConfigError, FeedbackError, RunError
from prefenv.feedback import Judgement, Retraction, model_hash
from prefenv.flow import RectifiedFlow
from prefenv.play import Episode, PlayConfig
from prefenv.registry import make_oracle
from prefenv.testing.probe import Probe, probe_env

QUICK = "learned-reward:pool=256,anchors=16,updates=20,batch=32,effective=64"
AGENTS = (QUICK, "hil-dd:lr=1e-3,data_batch=16", "pfm:updates=2,batch=16", "best-of-n", "ppo")
LIKED = (1.0, 0.0, 0.0, 0.0)
NONE, SKIP = (0.0,) * 4, (None,) * 4


def probe(folder, agent=QUICK, **settings):
    torch.manual_seed(0)
    reference = RectifiedFlow(Probe().network())
    settings = {"task": "prefenv.testing.probe:Probe", "steps": 8, "device": "cpu", **settings}
    return Episode(PlayConfig(agent=agent, **settings), folder, reference)


def weights(episode):
    """All that it has learned, as one name."""
    parts = [getattr(episode.agent, n) for n in episode.agent.persistent]
    return [model_hash(p) for p in parts if isinstance(p, torch.nn.Module)]


def same(a, b):
    """Two episodes at the same point, bit by bit."""
    assert a.question.ids == b.question.ids and a.question.number == b.question.number
    assert weights(a) == weights(b)
    assert [j.scores for (j,) in a.course.learned] == [j.scores for (j,) in b.course.learned]


# The order of the toy


@pytest.mark.parametrize("name", AGENTS)
def test_green_shapes_come_from_the_noises_of_the_red_ones(name, tmp_path):
    with probe(tmp_path, name) as episode:
        reference = episode.agent.env.reference
        assert episode.opening().shape == (6, 2)
        question = episode.question
        assert question.x.shape == (4, 2) and question.noise.shape == (4, 2)
        if name == "ppo":  # it explores: its proposals are model B's, by stochastic steps
            assert question.by == "B"
        elif "pfm" not in name and "hil-dd" not in name:
            assert question.by == "A"
            torch.testing.assert_close(reference.sample(question.noise), question.x)
        outcome = episode.answer(LIKED)
        assert outcome.taught and outcome.samples.shape == (6, 2)
        torch.testing.assert_close(outcome.same, episode.agent.sample(question.noise))
        stored = [episode.store.sample(name) for name in question.ids]
        assert [s.noise.tolist() for s in stored] == question.noise.tolist()
        assert {s.seed for s in stored} == {0} and stored[0].info["steps"] == 8


def test_the_env_knows_the_noises_of_what_was_judged():
    env, _ = probe_env(num_envs=4, control="noise")
    assert env.noise is None
    env.begin()
    action = torch.randn(4, 2)
    env.advance(action)
    assert torch.equal(env.noise, action), "where the action is the noise"
    env.judge(torch.zeros(4, 2))
    assert env.noise is None, "of samples that come from elsewhere nothing is known"


@pytest.mark.parametrize("name", ["hil-dd:lr=1e-3,data_batch=16", "pfm:updates=2,batch=16"])
def test_proposals_of_the_reference_by_stochastic_steps_are_red(name, tmp_path):
    with probe(tmp_path, name) as episode:
        assert episode.question.by == "A"
        episode.answer(LIKED)
        assert episode.question.by == "A"
        stored = episode.store.sample(episode.question.ids[0])
        assert stored.model == model_hash(episode.agent.reference)


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("scores", [NONE, SKIP])
def test_none_and_skip_teach_nothing_and_bring_other_proposals(scores, name, tmp_path):
    with probe(tmp_path, name) as episode:
        episode.answer(LIKED)
        before, asked = weights(episode), episode.question
        noise = torch.randn(32, 2)
        made = episode.agent.sample(noise)
        outcome = episode.answer(scores)
        assert not outcome.taught
        assert weights(episode) == before
        assert torch.equal(episode.agent.sample(noise), made)
        assert set(episode.question.ids).isdisjoint(asked.ids)
        assert [j.scores for j in episode.store.judgements()] == [LIKED, scores]


def test_none_teaches_where_it_is_asked_to(tmp_path):
    agent = "learned-reward:pool=256,anchors=16,updates=20,batch=32,effective=64,tolerance=0"
    with probe(tmp_path / "a", agent, none_teaches=True) as episode:
        episode.answer(LIKED)
        before = weights(episode)
        assert episode.answer(NONE).taught
        assert weights(episode) != before
        before = weights(episode)
        assert not episode.answer(SKIP).taught
        assert weights(episode) == before


# Nothing is lost


@pytest.mark.parametrize("name", AGENTS)
def test_undo_goes_back_bit_by_bit_and_is_seen_in_the_history(name, tmp_path):
    with probe(tmp_path / "a", name) as episode, probe(tmp_path / "b", name) as other:
        assert episode.undo() is None
        for e in (episode, other):
            e.answer(LIKED)
        asked, before = episode.question, weights(episode)
        kept = episode.keep((0.0, 1.0, 0.0, 0.5), seconds=2.0)
        episode.learn()
        assert episode.undo() == kept
        assert episode.question.ids == asked.ids and weights(episode) == before
        same(episode, other)
        history = episode.store.history()
        assert [type(e) for e in history] == [Judgement, Judgement, Retraction]
        assert history[2].judgement == kept.id
        for e in (episode, other):
            e.answer(LIKED[::-1])
        same(episode, other)
        assert episode.undo() and episode.undo() and episode.undo() is None
        assert episode.question.number == 1


def test_undo_reaches_further_than_the_kept_states(tmp_path):
    with probe(tmp_path) as episode:
        asked = []
        for i in range(11):
            asked.append(episode.question.ids)
            episode.answer([float(j == i % 4) for j in range(4)])
        assert len(list((tmp_path / "states").iterdir())) <= 10
        for ids in reversed(asked):
            assert episode.undo()
            assert episode.question.ids == ids


@pytest.mark.parametrize("name", AGENTS)
def test_it_goes_on_where_it_stopped(name, tmp_path):
    with probe(tmp_path / "a", name) as whole:
        for scores in (LIKED, NONE, (0.1, 0.2, 0.0, 0.7)):
            whole.answer(scores)
        with probe(tmp_path / "b", name) as part:
            part.answer(LIKED)
            part.answer(NONE)
            part.keep((0.1, 0.2, 0.0, 0.7))  # and the process dies before it learned
        with probe(tmp_path / "b", name) as again:
            assert again.resumed == 3
            same(whole, again)
        for state in (tmp_path / "b" / "states").iterdir():
            state.write_bytes(b"damaged")
        with probe(tmp_path / "b", name) as replayed:
            same(whole, replayed)


def test_another_answer_after_an_undo_is_not_taken_for_the_first(tmp_path):
    with probe(tmp_path / "a") as whole:
        whole.answer(LIKED[::-1])
        with probe(tmp_path / "b") as part:
            part.answer(LIKED)
            part.undo()
            part.keep(LIKED[::-1])  # and the process dies before it learned
        with probe(tmp_path / "b") as again:
            same(whole, again)


def test_learning_that_is_interrupted_is_taken_up_again(tmp_path, monkeypatch):
    with probe(tmp_path / "a") as whole, probe(tmp_path / "b") as episode:
        whole.answer(LIKED)
        before = weights(episode)
        episode.keep(LIKED)
        step = torch.optim.Adam.step
        calls = []

        def interrupt(self, *args):
            calls.append(step(self, *args))
            if len(calls) == 5:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.Adam, "step", interrupt)
            with pytest.raises(KeyboardInterrupt):
                episode.learn()
        assert weights(episode) == before and not episode.course.learned
        assert episode.finish()["learned"] == 0 and episode.finish()["answers"] == 1
        same(whole, episode)  # asking learns from what is kept


def test_two_processes_do_not_answer_in_one_folder(tmp_path):
    with probe(tmp_path) as one, probe(tmp_path) as two:
        one.answer(LIKED)
        assert two.question.number == 2, "it learns from what the other one kept"
        one.answer(LIKED)
        one.undo()
        one.undo()
        with pytest.raises(RunError, match="another process answers"):
            two.keep(LIKED)


def test_a_folder_of_another_episode_is_refused(tmp_path):
    probe(tmp_path).close()
    with pytest.raises(RunError, match="holds another run"):
        probe(tmp_path, seed=1)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        probe(tmp_path)


def test_answers_to_other_samples_are_refused(tmp_path):
    with probe(tmp_path / "a", seed=1) as other, probe(tmp_path / "b") as episode:
        foreign = [other.store.sample(name) for name in other.question.ids]
        episode.store.put(foreign)
        episode.store.answer(Judgement(other.question.ids, LIKED, "person"))
    with pytest.raises(RunError, match="given to other samples"):
        probe(tmp_path / "b")


def test_mistakes_are_named(tmp_path):
    with probe(tmp_path / "a") as episode:
        with pytest.raises(FeedbackError, match="2 scores for 4 samples"):
            episode.keep((1.0, 0.0))
        with pytest.raises(FeedbackError, match="no new answer"):
            episode.learn()
        assert episode.store.history() == []
    with pytest.raises(ConfigError, match="reward gradient"):
        probe(tmp_path / "b", "adjoint")
    with pytest.raises(ConfigError, match="panels of at least 2"):
        probe(tmp_path / "c", "d3po", panel_size=1)
    with pytest.raises(ConfigError, match="at least one"):
        PlayConfig(shown=0)


def test_the_summary_counts(tmp_path):
    with probe(tmp_path) as episode:
        for scores in (LIKED, NONE, SKIP, LIKED):
            episode.answer(scores, seconds=1.5)
        episode.undo()
        summary = episode.finish()
    counts = {"answers": 3, "choices": 1, "none_will_do": 1, "skips": 1, "undone": 1, "learned": 3}
    assert counts.items() <= summary.items()
    assert summary["seconds_answering"] == 4.5
    assert sum(summary["rates_before"].values()) == pytest.approx(1)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "shapes.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.cuda
def test_on_a_gpu_it_goes_on_where_it_stopped(tmp_path):
    with probe(tmp_path / "a", device="cuda") as whole:
        for scores in (LIKED, SKIP, LIKED):
            outcome = whole.answer(scores)
        assert outcome.samples.is_cuda and outcome.same.is_cuda and whole.question.x.is_cuda
        with probe(tmp_path / "b", device="cuda") as part:
            part.answer(LIKED)
            part.keep(SKIP)
        with probe(tmp_path / "b", device="cuda") as again:
            again.answer(LIKED)
            same(whole, again)
        assert sum(whole.finish()["rates_after"].values()) == pytest.approx(1)


# The promise


@pytest.mark.parametrize("seed", [100, 101])
def test_three_answers_raise_the_rate_of_s_curves(seed, tmp_path):
    agent = "learned-reward:pool=1024,updates=80,effective=128"
    config = PlayConfig(agent=agent, seed=seed, device="cpu")
    with Episode(config, tmp_path) as episode:
        person = make_oracle("s-curve", episode.task)
        answered = 0
        while answered < 3:  # where there is no S, none will do, as in the toy
            chosen = (person.score(episode.question.x) >= person.threshold).float().tolist()
            answered += episode.answer(chosen).taught
        summary = episode.finish()
    before, after = (summary[k]["s-curve"] for k in ("rates_before", "rates_after"))
    assert 0.15 < before < 0.3
    assert after > before + 0.3
