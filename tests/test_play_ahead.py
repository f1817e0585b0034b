"""Asked ahead: the answers alone decide the state, whatever is pending, and nothing pending is asked twice."""

from __future__ import annotations

import pytest
import torch

from agents.reward_model import choose, conditioned
from prefenv.errors import ConfigError, RunError
from prefenv.feedback import Judgement, sample_id
from prefenv.flow import RectifiedFlow
from prefenv.play import PlayConfig
from prefenv.play.ahead import Ahead, make_course
from prefenv.registry import AGENTS, make_agent
from prefenv.testing.probe import Probe, probe_env

QUICK = "learned-reward:pool=256,anchors=16,updates=5,batch=32,effective=64,tolerance=0.0"
OWN = ("hil-dd:lr=1e-3,data_batch=16,updates=2", "flow-dpo:updates=2", "best-of-n:updates=2")


def course_of(folder, agent=QUICK, ahead=1, panels=1, **settings):
    torch.manual_seed(0)
    reference = RectifiedFlow(Probe().network())
    settings = {"task": "prefenv.testing.probe:Probe", "steps": 8, "device": "cpu", **settings}
    config = PlayConfig(agent=agent, **settings)
    return make_course(config, folder, panels=panels, ahead=ahead, reference=reference)


def liked(asked):
    """Whoever answers wants what lies furthest to the right; each panel's answer."""
    return tuple(
        Judgement(tuple(map(sample_id, x)), tuple((x[:, 0] == x[:, 0].max()).float().tolist()))
        for x in asked.x
    )


def played(course, n):
    """The questions of ``n`` rounds that were answered in their order."""
    questions = []
    for _ in range(n):
        asked = course.ask()[0]
        questions.append([[sample_id(x) for x in panel] for panel in asked.x])
        course.play(liked(asked))
    return questions


def weights(course):
    return torch.cat([p.detach().flatten() for p in course.agent.model.parameters()])


def same(a, b):
    assert torch.equal(weights(a), weights(b))
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(a.agent.sample(noise), b.agent.sample(noise))
    assert [asked.x.tolist() for asked in a.ask()] == [asked.x.tolist() for asked in b.ask()]
    assert a.agent.env.ledger == b.agent.env.ledger


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_every_agent_that_can_be_asked_ahead_learns_and_goes_on_exactly(name, tmp_path):
    agent = QUICK if name == "learned-reward" else name
    if name in ("adjoint", "draft"):
        with pytest.raises(ConfigError, match="reward gradient"):
            course_of(tmp_path, agent, None)
        return
    a = course_of(tmp_path / "a", agent, None, panels=2)
    if not isinstance(a, Ahead):
        assert len(a.ask()) == 1
        with pytest.raises(ConfigError, match=f"{name} asks about its own newest samples"):
            course_of(tmp_path / "b", agent, 1)
        return
    assert (a.ahead, len(a.ask())) == (1, 2)
    before, ledger = weights(a), a.agent.env.ledger
    chain = len(a.agent.chain())
    played(a, 2)
    assert (
        not torch.equal(weights(a), before) or name == "best-of-n" or len(a.agent.chain()) > chain
    )
    assert (ledger.queries, ledger.panels) == (16, 4), "what is pending is not booked yet"
    assert [asked.number for asked in a.ask()] == [2, 3]
    assert [asked.learned for asked in a.ask()] == [1, 2]
    again = course_of(tmp_path / "a", agent, None, panels=2)
    again.rebuild(a.learned)  # from the file
    same(a, again)
    replayed = course_of(tmp_path / "c", agent, None, panels=2)
    replayed.rebuild(a.learned)  # one after the other
    same(a, replayed)
    replayed.rebuild(a.learned[:1])
    asked = [q.x for q in replayed.ask()]
    again.rebuild(a.learned[:1])
    assert all(torch.equal(x, q.x) for x, q in zip(asked, again.ask(), strict=True))


@pytest.mark.parametrize("agent", OWN)
def test_where_model_A_is_asked_about_it_makes_no_difference_how_far_ahead(agent, tmp_path):
    one, three = (course_of(tmp_path / str(n), agent, n) for n in (1, 3))
    questions = played(one, 4)
    assert questions == played(three, 4)
    assert torch.equal(weights(one), weights(three))
    assert len({name for ((*names,),) in questions for name in names}) == 16, "all are new"


def test_what_is_pending_counts_as_asked():
    env, _ = probe_env(num_envs=4, panel_size=4)
    agent = make_agent(QUICK, env, seed=3)
    first = agent.ask()
    second = agent.ask([first])
    third = agent.ask([first, second])
    design = choose(agent.believe(), agent.mixtures[0], agent.distance, agent.times, 12)
    asked = torch.cat([r.samples for r in (first, second, third)])
    assert torch.equal(asked, agent.pool[0][design]), "three rounds are one design"
    assert torch.equal(agent.ask().samples, first.samples), "and asking changes nothing"


def test_the_variance_that_is_left_does_not_depend_on_the_answers():
    rng = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=rng, dtype=torch.float64)
    c, z = root @ root.T, torch.randn(3, 5, generator=rng, dtype=torch.float64)
    gain = c @ z.T @ torch.linalg.inv(z @ c @ z.T + 0.3 * torch.eye(3, dtype=c.dtype))
    torch.testing.assert_close(conditioned(c, z, 0.3), c - gain @ z @ c)


def test_a_choice_made_ahead_is_one_round_stale_and_no_more(tmp_path):
    late, now = course_of(tmp_path / "late", ahead=1), course_of(tmp_path / "now", ahead=0)
    (first,), (second,) = played(late, 1), played(now, 1)
    assert first == second, "before any answer they ask alike"
    stale, fresh = late.ask()
    asked = [{sample_id(x) for x in q.x[0]} for q in (stale, fresh)]
    assert set(first[0]).isdisjoint(asked[0] | asked[1]) and asked[0].isdisjoint(asked[1])
    other = course_of(tmp_path / "other", ahead=1)
    asked = other.ask()[0]
    answer = tuple(Judgement(j.samples, j.scores[::-1]) for j in liked(asked))
    other.play(answer)
    assert torch.equal(other.ask()[0].x, stale.x), "it was asked before this answer came"
    assert not torch.equal(other.ask()[1].x, fresh.x), "and this one after it"


def test_an_agent_that_asks_more_than_the_panels_of_its_round_is_refused(tmp_path):
    course = course_of(tmp_path, ahead=0)
    course.agent.round = lambda: course.agent.env.judge(torch.zeros(8, 2))
    with pytest.raises(ConfigError, match="does not ask 1 panels at once"):
        course.ask()


def test_answers_to_other_questions_are_refused(tmp_path):
    course = course_of(tmp_path)
    before = [asked.x for asked in course.ask()]
    with pytest.raises(RunError, match="given to other samples"):
        course.play(liked(course.ask()[1]))
    assert course.learned == [] and course.agent.feed is None
    assert all(torch.equal(x, asked.x) for x, asked in zip(before, course.ask(), strict=True))


@pytest.mark.parametrize("where", ["optimizer", "question"])
def test_learning_that_is_interrupted_leaves_everything_as_it_was(where, tmp_path, monkeypatch):
    whole, course = course_of(tmp_path / "a"), course_of(tmp_path / "b")
    played(whole, 2)
    played(course, 1)

    def interrupt(*args):
        raise KeyboardInterrupt

    target = (torch.optim.Adam, "step") if where == "optimizer" else (Ahead, "_draw")
    with monkeypatch.context() as patch:
        patch.setattr(*target, interrupt)
        with pytest.raises(KeyboardInterrupt):
            course.play(liked(course.ask()[0]))
    assert len(course.learned) == 1 and course.agent.feed is None and not course.person.away
    played(course, 1)
    same(whole, course)


@pytest.mark.cuda
def test_on_a_gpu_it_is_asked_ahead_and_goes_on(tmp_path):
    a = course_of(tmp_path / "a", device="cuda")
    played(a, 3)
    assert a.ask()[0].x.is_cuda
    again = course_of(tmp_path / "a", device="cuda")
    again.rebuild(a.learned)
    same(a, again)
