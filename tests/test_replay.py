"""The replay oracle: a run answered from its feedback file is the run."""

from __future__ import annotations

import copy

import gymnasium as gym
import pytest
import torch

from oracles.replay import Replay
from oracles.s_curve import SCurve
from prefenv.agent import Agent
from prefenv.errors import ConfigError, FeedbackError
from prefenv.feedback import FeedbackStore, Judgement
from prefenv.oracle import Oracle
from prefenv.registry import make_agent, make_oracle
from prefenv.tasks.shapes import Shapes
from prefenv.testing import check_oracle

TASK = Shapes()


class Recorder(Oracle):
    """Puts every question to an oracle and keeps the answers, samples shown in reverse."""

    def __init__(self, oracle: Oracle, store: FeedbackStore):
        super().__init__(oracle.task)
        self.oracle, self.store = oracle, store

    def judge(self, panels):
        told = self.oracle.judge(panels)
        asked = self.store.ask(panels)
        self.store.record(
            Judgement(p.samples[::-1], tuple(row.flip(0).tolist()), "recorder")
            for p, row in zip(asked, told, strict=True)
        )
        return told


def learned(agent: str, oracle: Oracle) -> Agent:
    env = gym.make_vec(
        "prefenv/Shapes-v0", num_envs=16, oracle=oracle, panel_size=4, steps=4, max_queries=64
    )
    return make_agent(agent, env, seed=100).learn(64)


@pytest.mark.parametrize("agent", ["d3po", "flow-dpo"])
def test_a_replayed_run_comes_out_the_same(agent, tmp_path):
    path = tmp_path / "feedback.sqlite"
    with FeedbackStore(path) as store:
        first = learned(agent, Recorder(SCurve(TASK), store))
        assert len(store.judgements()) == 16
    again = learned(agent, Replay(TASK, str(path), "error"))
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    noise = torch.randn(4, 64, 2)
    assert torch.equal(first.sample(noise), again.sample(noise))
    assert not torch.equal(first.sample(noise), first.env.reference.sample(noise)), "it did learn"


@pytest.fixture
def answered(tmp_path):
    """A file with answers to two panels of three, the second a skip; and all three panels."""
    path = tmp_path / "feedback.sqlite"
    panels = TASK.data(6, torch.Generator().manual_seed(0))[0].unflatten(0, (3, 2))
    with FeedbackStore(path) as store:
        asked = store.ask(panels)
        store.answer(Judgement(asked[0].samples, (0, 1)))
        store.answer(Judgement(asked[1].samples, (None, None)))
    return str(path), panels


def test_what_nobody_answered_is_not_answered(answered):
    path, panels = answered
    expected = torch.tensor([[0, 1], [torch.nan] * 2, [torch.nan] * 2])
    oracle = make_oracle(f"replay:path={path}", TASK)
    torch.testing.assert_close(oracle.judge(panels), expected, equal_nan=True)
    torch.testing.assert_close(oracle.judge(panels.flip(1)), expected.flip(1), equal_nan=True)
    assert bool(oracle.judge(panels[:, :1]).isnan().all()), "a part of a panel is another panel"
    assert bool(oracle.judge(panels + 1e-6).isnan().all()), "another sample is another sample"


def test_missing_answers_can_be_an_error(answered):
    path, panels = answered
    strict = Replay(TASK, path, "error")
    assert strict.judge(panels[:2])[0].tolist() == [0, 1]
    with pytest.raises(FeedbackError, match="no answer to 1 of 3 panels"):
        strict.judge(panels)
    with pytest.raises(ConfigError, match="skip or error"):
        Replay(TASK, path, "ignore")
    with pytest.raises(FeedbackError, match="no feedback file"):
        Replay(TASK, path + "x")


def test_an_undone_answer_is_gone(answered):
    path, panels = answered
    oracle = Replay(TASK, path)
    with FeedbackStore(path) as store:
        store.undo()
        store.undo()
        assert bool(oracle.judge(panels).isnan().all()), "read while the file is open elsewhere"


def test_it_is_an_oracle(answered):
    path, panels = answered
    oracle = Replay(TASK, path)
    check_oracle(oracle, panels.flatten(0, 1), low=0, high=1)
    assert copy.deepcopy(oracle).judge(panels).shape == (3, 2)


@pytest.mark.cuda
def test_cuda_gets_its_answers_there(answered):
    path, panels = answered
    told = Replay(TASK, path).judge(panels.cuda())
    assert told.is_cuda and told[0].tolist() == [0, 1]
